"""``weight_norm(v, g, dim)`` and ``norm_except_dim(v, dim)`` as functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function

from . import _autograd, composed, forms, native, observers
from .backends import choice, choose, has_choice
from .backends.base import Backend, PythonBackend
from .forms import Problems
from .problem import (
    Problem,
    accumulation_dtype,
    check,
    check_forward,
    check_lengths,
    check_v,
    list_of,
    norm_shape,
)

_native = native.weight_norm
_native_list = native.weight_norms


def weight_norm(
    v: Tensor,
    g: Tensor,
    dim: int | None = 0,
    *,
    eps: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Weight normalisation (Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868).

    .. math:: w = g \, \frac{v}{\max(\lVert v \rVert_2, \epsilon)}

    with one norm for each index along ``dim``. Differentiable in ``v`` and ``g`` to any order; the
    backward may run more than once. Where one norm spans the whole tensor and v and g have half
    types, the norm is first rounded to g's (if that gives a normal number), as in torch, and
    ``eps`` bounds what comes out; derivatives are those of the formula.

    Args:
        v: direction, any shape with at least one dimension; float16, bfloat16, float32 or float64,
            in any memory order.
        g: magnitude, of shape 1 everywhere but ``v.shape[dim]`` along ``dim``; 0-dimensional or of
            shape (1,) when one norm spans the whole tensor; any of the four dtypes; on v's device.
        dim: the dimension that keeps its norms apart. ``None`` and -1 mean the whole tensor, as in
            torch; -2, -3, ... count from the end.
        eps: lower bound of the norm, as in :func:`torch.nn.functional.normalize`. With 0 a zero
            row gives NaN, as in torch; with a positive eps it gives zeros and finite gradients.
        out_dtype: dtype of the result; v's by default. Norms are float32 for half types whatever
            the dtype of the result.

    Returns:
        ``w``, of v's shape and memory format.

    Raises:
        TypeError: an argument of the wrong type, layout or dtype.
        ValueError: a wrong shape, device, dim or eps.
        RuntimeError: a backend was asked for (:func:`wnkernel.use_backend`) that cannot run.
    """
    # Whoever traces a program sees an operator, or what an exporter is to see.
    if _native is not None and not is_compiling() and choice.forced is None:
        w = _native(v, g, dim, eps, out_dtype)
        if w is not NotImplemented:
            return w
    if has_torch_function((v, g)):
        return handle_torch_function(weight_norm, (v, g), v, g, dim, eps=eps, out_dtype=out_dtype)
    if is_compiling():
        return _traced(check(v, g, dim, eps, out_dtype))
    if observers.is_torchscript_trace():
        return _in_torchscript([v], [g], [dim], [eps], out_dtype)[0]
    if observers.is_distributed(v) or observers.is_distributed(g):
        return composed.weight_norm(check(v, g, dim, eps, out_dtype))
    problems = forms.known(v, g, dim, eps, out_dtype)
    backend = choose(v)
    if backend.is_compiled:
        return torch.ops.wnkernel.weight_norm(v, g, *problems.options[0])
    return _on_python_backend(problems, backend)[0]


def weight_norm_in_graph(
    v: Tensor,
    g: Tensor,
    dim: int,
    eps: float,
    out_dtype: torch.dtype | None,
    bucket: int | None,
) -> Tensor:
    """:func:`weight_norm` for code that Dynamo traces. Weights of one ``bucket`` share a launch."""
    if has_torch_function((v, g)):
        return handle_torch_function(weight_norm, (v, g), v, g, dim, eps=eps, out_dtype=out_dtype)
    return _traced(check(v, g, dim, eps, out_dtype), bucket)


def weight_norms(
    v: Sequence[Tensor],
    g: Sequence[Tensor],
    dim: Sequence[int | None],
    *,
    eps: Sequence[float] | None = None,
    out_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """:func:`weight_norm` of many weights: one launch forward, one backward, one autograd node.

    The bits are those of :func:`weight_norm`. Weights of which neither ``v`` nor ``g`` requires
    grad give results that do not; weights from which nothing was computed get no gradient.

    Args:
        v: directions, on one device, of any shapes and dtypes.
        g: a magnitude for each of them.
        dim: a dimension for each of them.
        eps: a lower bound of the norm for each of them; 0 by default.
        out_dtype: dtype of all results; by default each has that of its v.

    Returns:
        ``w`` of every weight.

    Raises:
        TypeError: an argument of the wrong type, layout or dtype.
        ValueError: lists of different lengths, weights on different devices, or a wrong shape, dim
            or eps.
        RuntimeError: a backend was asked for (:func:`wnkernel.use_backend`) that cannot run.
    """
    v, g, dim = list_of("v", v), list_of("g", g), list_of("dim", dim)
    eps = [0.0] * len(v) if eps is None else list_of("eps", eps)
    check_lengths(len(v), g=g, dim=dim, eps=eps)
    if not v:
        return []
    if _native_list is not None and not is_compiling() and choice.forced is None:
        w = _native_list(v, g, dim, eps, out_dtype)
        if w is not NotImplemented:
            return w
    if has_torch_function((*v, *g)):
        return handle_torch_function(
            weight_norms, (*v, *g), v, g, dim, eps=eps, out_dtype=out_dtype
        )
    if is_compiling():
        return _traced_list(check_forward(v, g, dim, eps, out_dtype), out_dtype)
    if observers.is_torchscript_trace():
        return _in_torchscript(v, g, dim, eps, out_dtype)
    if any(map(observers.is_distributed, (*v, *g))):
        return [composed.weight_norm(p) for p in check_forward(v, g, dim, eps, out_dtype)]
    # copied: the backward needs them, and the caller's lists may have changed by then
    problems = forms.known_list([*v], [*g], dim, eps, out_dtype)
    backend = choose(v[0])
    if backend.is_compiled:
        dim, eps, _ = map(list, zip(*problems.options, strict=True))
        return torch.ops.wnkernel.forward(v, g, dim, eps, out_dtype)[: len(v)]
    return _on_python_backend(problems, backend)


def norm_except_dim(v: Tensor, dim: int | None = 0) -> Tensor:
    """The norms that ``weight_norm(v, g, dim)`` divides by: with them as g, w is v.

    To the last bit, as far as v's dtype holds them. Where function transforms, forward-mode AD,
    compilers or tracers are at work, on DTensors, and where the backend that was asked for cannot
    take v, they come from another formula, whose last bits may differ.

    Differentiable to any order; the gradient of a zero row is 0. Rows whose squares leave v's range
    are right as long as their norm is in it.

    Args:
        v: as for :func:`weight_norm`.
        dim: as for :func:`weight_norm`.

    Returns:
        The Euclidean norms, in v's dtype, of the shape that ``g`` has.

    Raises:
        TypeError: v is no dense floating-point tensor.
        ValueError: v is 0-dimensional, or ``dim`` is out of range.
    """
    if has_torch_function((v,)):
        return handle_torch_function(norm_except_dim, (v,), v, dim=dim)
    return norms_for(v, check_v(v, dim), 0.0)


def norms_for(v: Tensor, dim: int, eps: float) -> Tensor:
    """What weight norms with a canonical ``dim`` and an ``eps`` divide by, ``max(norm, eps)``: as g
    it gives w = v. Without ``eps`` that is :func:`norm_except_dim`."""
    if has_torch_function((v,)):
        return handle_torch_function(norms_for, (v,), v, dim, eps)
    if is_compiling() or not _has_kernels_norms(v):
        return _clamped(_composed_norms(v, dim), eps).to(v.dtype)
    norms = partial(_norms, dim=dim, eps=eps)
    if torch.is_grad_enabled() and v.requires_grad:
        return _clamped(_autograd.norms(v, norms, partial(weight_norm, dim=dim)), eps)
    return _clamped(norms(v), eps).to(v.dtype)


def _clamped(norm: Tensor, eps: float) -> Tensor:
    return norm.clamp_min(eps) if eps else norm


def _has_kernels_norms(v: Tensor) -> bool:
    """Whether there is a kernel to ask for norms. A layer may be built where the backend that was
    asked for cannot run, and moved afterwards."""
    return (
        v.numel() > 0
        and not observers.is_distributed(v)
        and observers.are_untouched([v])
        and has_choice(v)
    )


def _norms(v: Tensor, dim: int, eps: float) -> Tensor:
    """The norms that the kernels for v compute, in the dtype of norms and not clamped. On the eager
    backend those with an ``eps`` come from other operators than those without."""
    g = v.new_ones(norm_shape(v.shape, dim), dtype=accumulation_dtype(v.dtype))
    return choose(v).norm(v, g, dim, eps)


def _composed_norms(v: Tensor, dim: int) -> Tensor:
    return composed.norm_except_dim(v.to(accumulation_dtype(v.dtype)), dim)


def _on_python_backend(problems: Problems, chosen: Backend) -> list[Tensor]:
    backend = cast(PythonBackend, chosen)
    tensors = *problems.v, *problems.g
    can_run = backend.is_traceable or observers.have_addresses(tensors)
    if observers.is_transformed(tensors) or not can_run:
        return [composed.weight_norm(p) for p in problems]
    return _autograd.weight_norms(problems, backend)


def _traced(p: Problem, bucket: int | None = None) -> Tensor:
    """What a compiler sees: one operator if there are kernels of ours behind it. What an exporter
    sees: the plain formula."""
    if observers.is_exporting():
        return composed.plain_weight_norm(p, p.divisor_dtype)
    if _have_operators((p,)):
        return torch.ops.wnkernel.weight_norm(p.v, p.g, p.dim, p.eps, p.out_dtype, bucket)
    return composed.weight_norm(p)


def _traced_list(problems: Sequence[Problem], out_dtype: torch.dtype | None) -> list[Tensor]:
    """The same for a list, which is one operator too."""
    if observers.is_exporting():
        return [composed.plain_weight_norm(p, p.divisor_dtype) for p in problems]
    if not _have_operators(problems):
        return [composed.weight_norm(p) for p in problems]
    columns = zip(*((p.v, p.g, p.dim, p.eps) for p in problems), strict=True)
    v, g, dim, eps = (list(column) for column in columns)
    return torch.ops.wnkernel.forward(v, g, dim, eps, out_dtype)[: len(v)]


def _in_torchscript(
    v: Sequence[Tensor],
    g: Sequence[Tensor],
    dim: Sequence[int | None],
    eps: Sequence[float],
    out_dtype: torch.dtype | None,
) -> list[Tensor]:
    """What the TorchScript tracer sees: the plain formula, and nothing of what is asked before."""
    with observers.tracer_paused():
        problems = check_forward(v, g, dim, eps, out_dtype)
        dtypes = [p.divisor_dtype for p in problems]
    reduce_l2 = observers.is_torchscript_onnx()
    return [
        composed.plain_weight_norm(p, dtype, reduce_l2=reduce_l2)
        for p, dtype in zip(problems, dtypes, strict=True)
    ]


def _have_operators(problems: Sequence[Problem]) -> bool:
    """Whether the kernels that weights on one device get are behind torch.ops.wnkernel, and take
    their tensors. Outside of compilers those of Triton are called without it, which is shorter."""
    for p in problems:
        if observers.is_distributed(p.v) or observers.is_distributed(p.g):
            return False
    v = problems[0].v
    return choose(v).has_operators(v)
