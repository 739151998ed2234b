"""``weight_norm(v, g, dim)`` and ``norm_except_dim(v, dim)`` as functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function

from . import _autograd, _ops, composed
from .backends import choice, choose
from .backends.compiled import CompiledBackend
from .problem import Problem, accumulation_dtype, check, check_v

_native = _ops.native_weight_norm


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
    backward may run more than once.

    Args:
        v: direction, any shape with at least one dimension; float16, bfloat16, float32 or float64,
            in any memory order.
        g: magnitude, of shape 1 everywhere but ``v.shape[dim]`` along ``dim``, 0-dimensional when
            one norm spans the whole tensor; any of the four dtypes; on v's device.
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
    # While a program is traced, by Dynamo or by export, only torch.ops is seen.
    if _native is not None and not is_compiling() and choice.forced is None:
        w = _native(v, g, dim, eps, out_dtype)
        if w is not NotImplemented:
            return w
    if has_torch_function((v, g)):
        return handle_torch_function(weight_norm, (v, g), v, g, dim, eps=eps, out_dtype=out_dtype)
    return _weight_norm_checked(check(v, g, dim, eps, out_dtype))


def norm_except_dim(v: Tensor, dim: int | None = 0) -> Tensor:
    """The norms that ``weight_norm(v, g, dim)`` divides by.

    Differentiable. Rows whose squares leave v's range are right as long as their norm is in it.

    Args:
        v: as for :func:`weight_norm`.
        dim: as for :func:`weight_norm`.

    Returns:
        The Euclidean norms, in v's dtype, of the shape that ``g`` has.

    Raises:
        TypeError: v is no dense floating-point tensor.
        ValueError: v is 0-dimensional, or ``dim`` is out of range.
    """
    dim = check_v(v, dim)
    return composed.norm_except_dim(v.to(accumulation_dtype(v.dtype)), dim).to(v.dtype)


def _weight_norm_checked(p: Problem) -> Tensor:
    backend = choose(p.v)
    if isinstance(backend, CompiledBackend):
        return torch.ops.wnkernel.weight_norm(p.v, p.g, p.dim, p.eps, p.out_dtype)
    if is_compiling() or _is_transformed(p.v) or _is_transformed(p.g):
        return composed.weight_norm(p)
    return _autograd.weight_norms([p], backend)[0]


def _is_transformed(t: Tensor) -> bool:
    """Whether a function transform or forward-mode AD is at work, which no custom node survives."""
    return torch._C._are_functorch_transforms_active() or unpack_dual(t).tangent is not None
