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

    Each index along ``dim`` has a norm of its own. The result is differentiable in ``v`` and ``g``
    to any order, and the backward may run more than once. If one norm spans the whole tensor and v
    and g have half types, the norm is rounded to g's dtype, as in torch, and then bounded by
    ``eps``; a norm that g's dtype cannot hold as a normal number is not rounded. Derivatives are
    those of the formula.

    Args:
        v: direction, of any shape with at least one dimension and in any memory order; float16,
            bfloat16, float32 or float64.
        g: magnitude, of any of these dtypes and on v's device. Its shape is ``v.shape[dim]`` along
            ``dim`` and 1 elsewhere, or () or (1,) if one norm spans the whole tensor.
        dim: the dimension along which each index has a norm. ``None`` and -1 mean one norm over the
            whole tensor, as in torch; -2, -3, ... count from the end.
        eps: lower bound of the norm, as in :func:`torch.nn.functional.normalize`. With ``eps=0`` a
            row of zeros gives NaN, as in torch; a positive eps gives zeros and finite gradients.
        out_dtype: dtype of the result; v's dtype by default. Norms of half types are computed in
            float32, whatever the dtype of the result is.

    Returns:
        ``w``, with v's shape and memory format.

    Raises:
        TypeError: if an argument has the wrong type, layout or dtype.
        ValueError: if a shape, device, ``dim`` or ``eps`` is wrong.
        RuntimeError: if the backend chosen by :func:`wnkernel.use_backend` cannot run.
    """
    # Traced code goes on below, where compilers get an operator and exporters the plain formula.
    if _native is not None and not is_compiling() and choice.forced is None:
        w = _native(v, g, dim, eps, out_dtype)
        if w is not NotImplemented:
            return w
    if has_torch_function((v, g)):
        return handle_torch_function(weight_norm, (v, g), v, g, dim, eps=eps, out_dtype=out_dtype)
    if is_compiling():
        return traced(check(v, g, dim, eps, out_dtype))
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
    return traced(check(v, g, dim, eps, out_dtype), bucket)


def weight_norms(
    v: Sequence[Tensor],
    g: Sequence[Tensor],
    dim: Sequence[int | None],
    *,
    eps: Sequence[float] | None = None,
    out_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """:func:`weight_norm` of many weights: one launch forward, one backward, one autograd node.

    The results have the same bits as those of :func:`weight_norm`. A result requires grad only if
    its ``v`` or ``g`` does. A weight gets no gradient if nothing was computed from it.

    Args:
        v: directions, on one device, of any shapes and dtypes.
        g: one magnitude for each v.
        dim: one dimension for each v.
        eps: one lower bound of the norm for each v; 0 by default.
        out_dtype: dtype of all results; by default each result has the dtype of its v.

    Returns:
        A list with ``w`` of every weight.

    Raises:
        TypeError: if an argument has the wrong type, layout or dtype.
        ValueError: if the lists have different lengths, the weights are on different devices, or a
            shape, ``dim`` or ``eps`` is wrong.
        RuntimeError: if the backend chosen by :func:`wnkernel.use_backend` cannot run.
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
    # The lists are copied, because the caller may change them before the backward reads them.
    problems = forms.known_list([*v], [*g], dim, eps, out_dtype)
    backend = choose(v[0])
    if backend.is_compiled:
        dim, eps, _ = map(list, zip(*problems.options, strict=True))
        return torch.ops.wnkernel.forward(v, g, dim, eps, out_dtype)[: len(v)]
    return _on_python_backend(problems, backend)


def norm_except_dim(v: Tensor, dim: int | None = 0) -> Tensor:
    """The norms that ``weight_norm(v, g, dim)`` divides by: with these norms as g, w is v.

    This holds to the last bit, as far as v's dtype can hold the norms. Under function transforms,
    forward-mode AD, compilers and tracers, for DTensors, and if the chosen backend cannot take v,
    the norms come from another formula, whose last bits may differ.

    The norms are differentiable to any order, and the gradient of a row of zeros is 0. A norm that
    v's dtype can hold is right even if the squares of its row leave the range of that dtype.

    Args:
        v: as for :func:`weight_norm`.
        dim: as for :func:`weight_norm`.

    Returns:
        The Euclidean norms, in v's dtype and with the shape of ``g`` in :func:`weight_norm`.

    Raises:
        TypeError: if v is not a dense floating-point tensor.
        ValueError: if v is 0-dimensional, or ``dim`` is out of range.
    """
    if has_torch_function((v,)):
        return handle_torch_function(norm_except_dim, (v,), v, dim=dim)
    return norms_for(v, check_v(v, dim), 0.0)


def norms_for(v: Tensor, dim: int, eps: float) -> Tensor:
    """``max(norm, eps)`` for a canonical ``dim``: weight norms divide by it, so as g it gives
    ``w = v``. With ``eps=0`` this is :func:`norm_except_dim`."""
    if has_torch_function((v,)):
        return handle_torch_function(norms_for, (v,), v, dim, eps)
    if is_compiling() or not _has_kernels_norms(v):
        return _clamped(_composed_norms(v, dim), eps).to(v.dtype)
    norms = partial(_norms, dim=dim, eps=eps)
    if torch.is_grad_enabled() and v.requires_grad:
        return _clamped(_autograd.norms(v, norms, partial(weight_norm, dim=dim)), eps)
    return _clamped(norms(v), eps).to(v.dtype)


def norms_in_full(v: Tensor, dim: int) -> Tensor:
    """:func:`norm_except_dim` for a canonical ``dim``, without grad and in the dtype of norms."""
    if is_compiling() or not _has_kernels_norms(v):
        return _composed_norms(v.detach(), dim)
    return _norms(v.detach(), dim, 0.0)


def _clamped(norm: Tensor, eps: float) -> Tensor:
    return norm.clamp_min(eps) if eps else norm


def _has_kernels_norms(v: Tensor) -> bool:
    """Whether a kernel can compute the norms of v. If the chosen backend cannot run, there is none,
    but a layer may be built there and moved afterwards."""
    return (
        v.numel() > 0
        and not observers.is_distributed(v)
        and observers.are_untouched([v])
        and has_choice(v)
    )


def _norms(v: Tensor, dim: int, eps: float) -> Tensor:
    """The unclamped norms that the kernels for v compute, in the dtype of norms. The eager backend
    computes them by other operators if there is an ``eps``."""
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


def traced(p: Problem, bucket: int | None = None) -> Tensor:
    """A checked weight norm in code that is being traced: the plain formula for exporters, and for
    compilers one operator if the kernels of this package can run it."""
    if observers.is_exporting():
        return composed.plain_weight_norm(p, p.divisor_dtype)
    if _have_operators((p,)):
        return torch.ops.wnkernel.weight_norm(p.v, p.g, p.dim, p.eps, p.out_dtype, bucket)
    return composed.weight_norm(p)


def _traced_list(problems: Sequence[Problem], out_dtype: torch.dtype | None) -> list[Tensor]:
    """The weight norms of a list in code that is being traced; the list is one operator too."""
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
    """The weight norms as the TorchScript tracer records them: the plain formula without the
    checks."""
    with observers.tracer_paused():
        problems = check_forward(v, g, dim, eps, out_dtype)
        dtypes = [p.divisor_dtype for p in problems]
    reduce_l2 = observers.is_torchscript_onnx()
    return [
        composed.plain_weight_norm(p, dtype, reduce_l2=reduce_l2)
        for p, dtype in zip(problems, dtypes, strict=True)
    ]


def _have_operators(problems: Sequence[Problem]) -> bool:
    """Whether torch.ops.wnkernel has the kernels for these weights, which are on one device, and
    can take their tensors. Code that is not compiled calls the Triton kernels directly, which is
    faster."""
    for p in problems:
        if observers.is_distributed(p.v) or observers.is_distributed(p.g):
            return False
    v = problems[0].v
    return choose(v).has_operators(v)
