"""The weight norm written in ordinary torch operators.

These functions are right on every device, under every transform and to every order of derivative.
They are slow, because they make several passes and temporary tensors. The eager backend uses them
where ``torch._weight_norm`` is wrong or missing, function transforms and forward-mode AD always use
them, and every Python-only backend takes its second derivative from here. csrc/composed.cpp is the
twin for the compiled operators.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor

from .observers import PLAIN
from .problem import WHOLE_TENSOR, Problem, accumulation_dtype, bound_of, norm_shape


def norm_except_dim(v: Tensor, dim: int) -> Tensor:
    """Norms of ``v`` for a canonical ``dim``, in v's dtype and differentiable.

    Each row is first divided by its largest absolute value, so that no square leaves the float
    range. Derivatives treat this divisor as a constant, which is right because norms are
    homogeneous. ``sum`` adds the squares in pairs; on the CPU ``vector_norm`` adds them one after
    the other, and is off by 6e-4 for 16 million squares in float32. For rows of zeros the root is
    taken of 1 instead of 0, so that their gradient is 0.
    """
    dims = tuple(k for k in range(v.ndim) if k != dim)
    if not dims:
        return v.abs()
    shape = norm_shape(v.shape, dim)
    if v.numel() == 0:
        return v.sum(dims).reshape(shape)
    scale = _largest(v.detach(), dims)
    scale = torch.where((scale > 0) & scale.isfinite(), scale, 1.0)
    squares = (v / scale).square().sum(dims, keepdim=True)
    is_zero = squares == 0
    root = squares.masked_fill(is_zero, 1.0).sqrt()
    return (root.masked_fill(is_zero, 0.0) * scale).reshape(shape)


def _largest(v: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The largest absolute value of each row. ``amax`` is ten times as fast as the equal infinity
    norm, but DTensors have no rule for ``amax`` in torch 2.6."""
    if type(v) in PLAIN:
        return v.abs().amax(dims, keepdim=True)
    return torch.linalg.vector_norm(v, torch.inf, dims, keepdim=True)


def weight_norm(p: Problem) -> Tensor:
    """``g * v / max(norm(v), eps)`` in differentiable operators, in v's memory format."""
    v = p.v.to(p.acc_dtype)
    return (v * (p.g.to(p.acc_dtype) / _divisor(p, v))).to(p.out_dtype)


def forced(p: Problem, norm: float) -> tuple[Tensor, Tensor]:
    """Replace v so that its norm is about ``norm``, and return w and the norm of the new v, both
    before it was rounded to its dtype. A row of zeros stays. Nothing may record gradients."""
    v = p.v.to(p.acc_dtype)
    old = norm_except_dim(v, p.dim).reshape(p.g.shape)
    scale = norm / _nonzero(divided_by(old, p.bound))
    v, new = v * scale, old * scale
    p.v.copy_(v)
    w = v * (p.g.to(p.acc_dtype) / _nonzero(divided_by(new, p.bound)))
    return w.to(p.out_dtype), new


def divided_by(norm: Tensor, bound: float) -> Tensor:
    """What rows with these norms are divided by, given :attr:`Problem.bound`: the larger of both,
    or ``norm - bound`` if the bound is negative."""
    return norm - bound if bound < 0 else norm.clamp_min(bound)


def _nonzero(divisor: Tensor) -> Tensor:
    return torch.where(divisor == 0, 1.0, divisor)


def normalize_(v: Tensor, g: Tensor | float, dim: int, eps: float) -> Tensor:
    """Write ``g * v / max(norm(v), eps)`` over v, where rows of zeros stay, and return the norms
    that were there."""
    acc = accumulation_dtype(v.dtype)
    x = v.to(acc)
    norm = norm_except_dim(x, dim)
    v.copy_(x / _nonzero(divided_by(norm, bound_of(eps, acc))) * g)
    return norm


def _divisor(p: Problem, v: Tensor) -> Tensor:
    """``max(norm, eps)``, where the norm is rounded to :attr:`Problem.divisor_dtype` before it is
    clamped. The rounding is added as a constant, so derivatives are those of the exact norm."""
    if p.eps < 0:
        return norm_except_dim(v, p.dim) - p.eps
    norm, clamped = _clamped_norm(p, v)
    if clamped is None or p.divisor_dtype == p.acc_dtype:
        return norm_held(norm, p.divisor_dtype)
    exact = norm.detach()
    n = norm_held(norm_except_dim(v.detach(), p.dim), p.divisor_dtype).clamp_min(p.bound)
    return norm + torch.where(n == exact, 0.0, n - exact)


def norm_held(norm: Tensor, dtype: torch.dtype) -> Tensor:
    """``norm`` rounded to values of ``dtype``, but unrounded where the rounded value is no normal
    number. The rounding is added as a constant, so derivatives are those of ``norm``."""
    if dtype == norm.dtype:
        return norm
    exact, info = norm.detach(), torch.finfo(dtype)
    rounded = exact.to(dtype).to(norm.dtype)
    is_normal = (rounded >= info.smallest_normal) & (rounded <= info.max)
    return norm + torch.where(is_normal, rounded - exact, 0.0)


def plain_weight_norm(p: Problem, divisor_dtype: torch.dtype, *, reduce_l2: bool = False) -> Tensor:
    """The formula for exporters, in a few operators that every exporter knows.

    Rows whose squares leave the range of :attr:`Problem.acc_dtype` get wrong norms.

    Args:
        p: the weight norm.
        divisor_dtype: ``p.divisor_dtype``. It is an argument because computing it reads sizes,
            which a tracer may record.
        reduce_l2: whether torch's ``vector_norm``, which becomes ONNX's ReduceL2, computes the
            norms.
    """
    v, g = _cast(p.v, p.acc_dtype), _cast(p.g, p.acc_dtype)
    norm = norm_held(_plain_norm(p, v, reduce_l2), divisor_dtype)
    if p.eps:
        norm = divided_by(norm, p.bound)
    return _cast(v * (g / norm), p.out_dtype)


def _plain_norm(p: Problem, v: Tensor, reduce_l2: bool) -> Tensor:
    """Norms by pairwise sums, or by ``vector_norm`` over one dimension at a time, because
    ``vector_norm`` is inaccurate for long sums (see :func:`norm_except_dim`)."""
    if not p.norm_dims:
        return v.abs()
    if reduce_l2:
        for k in p.norm_dims:
            v = torch.linalg.vector_norm(v, 2, k, keepdim=True)
        return v
    squares = (v * v).sum(p.norm_dims, keepdim=p.dim != WHOLE_TENSOR)
    if p.eps:  # the derivative of a root at zero is infinite, and zero times that is NaN
        squares = squares.clamp_min(torch.finfo(p.acc_dtype).smallest_normal)
    return squares.sqrt()


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast ``t`` to a dtype. A cast to its own dtype is left out, because a tracer would record
    it."""
    return t if t.dtype == dtype else t.to(dtype)


def gradients(p: Problem, norm: Tensor, grad_w: Tensor) -> tuple[Tensor, Tensor]:
    """First derivative: ``(grad_v, grad_g)`` from the unclamped ``norm`` kept by the forward.

    With u = v / n and s = <grad_w, u> per row: grad_v = (g / n) (grad_w - u s n / norm), grad_g =
    s. Rows with norm < eps have a constant denominator, so there grad_v has no term u s, and rows
    of zeros have no direction.
    """
    acc = p.acc_dtype
    v, g, grad_w, norm = (t.to(acc) for t in (p.v, p.g, grad_w, norm))
    n = divided_by(norm, p.bound)
    inverse = n.reciprocal()
    u = v * inverse
    s = _row_sum(p, grad_w * u)
    if p.eps < 0:
        along = torch.where(norm == 0, 0.0, s * (n / _nonzero(norm)))
    else:
        along = s if p.eps == 0 else s.masked_fill(norm < p.bound, 0.0)
    grad_v = (g * inverse) * (grad_w - u * along)
    return grad_v.to(p.v.dtype), s.to(p.g.dtype)


def wanted(
    grads: Iterable[tuple[Tensor, Tensor]], need_v: Sequence[bool], need_g: Sequence[bool]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Turn results of :func:`gradients` into lists of ``grad_v`` and ``grad_g``, with None for each
    gradient that is not needed."""
    grad_v, grad_g = zip(*grads, strict=True)
    return (
        [t if need else None for t, need in zip(grad_v, need_v, strict=True)],
        [t if need else None for t, need in zip(grad_g, need_g, strict=True)],
    )


def double_backward(
    p: Problem, grad_w: Tensor, gg_v: Tensor | None, gg_g: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Second derivative: gradients of ``<gg_v, grad_v> + <gg_g, grad_g>`` with respect to
    ``(grad_w, v, g)``, where ``(grad_v, grad_g)`` is the result of :func:`gradients`.

    The norm is differentiated in full. With c = g / n, a = <gg_v, u>, s = <grad_w, u> and t =
    <gg_v, grad_w> - a s per row::

        d grad_w = c (gg_v - u a) + gg_g u
        d g      = t / n
        d v      = (gg_g (grad_w - u s) - c (t u + s (gg_v - u a) + a (grad_w - u s))) / n

    Where the norm is clamped, the terms through it vanish. All operators are differentiable, so
    derivatives of higher order follow.

    If something is added to norms, let u = v / norm and h = norm / n. Then t = <gg_v, grad_w> - h a
    s, u a and u s have the factor h where they are subtracted from gg_v or grad_w, except for the
    last two terms of d v, gg_g u is gg_g v / n, and t of d v is t + (1 - h) a s.
    """
    acc = p.acc_dtype
    v, g, dw = (t.to(acc) for t in (p.v, p.g, grad_w))
    gg_v = torch.zeros_like(v) if gg_v is None else gg_v.to(acc)
    gg_g = torch.zeros_like(g) if gg_g is None else gg_g.to(acc)
    norm, clamped = _clamped_norm(p, v)
    n = norm if p.eps >= 0 else torch.where(cast(Tensor, clamped), -p.eps, norm - p.eps)
    h = 1.0 if p.eps >= 0 else norm / n
    inverse = n.reciprocal()
    u = v / norm if p.eps < 0 else v * inverse
    c = g * inverse
    a_full = _row_sum(p, gg_v * u)
    s_full = _row_sum(p, dw * u)
    a = a_full if clamped is None else a_full.masked_fill(clamped, 0.0)
    s = s_full if clamped is None else s_full.masked_fill(clamped, 0.0)
    t = _row_sum(p, gg_v * dw) - h * (a * s)
    through_norm = (t + (1.0 - h) * (a * s)) * u + s * (gg_v - u * a) + a * (dw - u * s)
    if clamped is not None:
        through_norm = through_norm.masked_fill(clamped, 0.0)
    d_grad_w = c * (gg_v - u * (h * a)) + gg_g * (v * inverse)
    d_v = inverse * (gg_g * (dw - u * (h * s)) - c * through_norm)
    return d_grad_w.to(grad_w.dtype), d_v.to(p.v.dtype), (t * inverse).to(p.g.dtype)


def _row_sum(p: Problem, x: Tensor) -> Tensor:
    # sum() takes an empty tuple for all dims, but a vector with a norm per element has no sum.
    return x.sum(p.norm_dims, keepdim=True).reshape(p.g.shape) if p.norm_dims else x


def _clamped_norm(p: Problem, v: Tensor) -> tuple[Tensor, Tensor | None]:
    """``max(norm, eps)`` and the mask of clamped rows, which is None if eps is 0. If eps is
    negative, which bounds nothing, rows of zeros are masked, and their norm is arbitrary.

    Clamped rows are replaced before the norm is computed. The derivative of a norm at a row of
    zeros is 0/0, and a mask after the norm would multiply this NaN by zero.
    """
    if p.eps == 0.0:
        return norm_except_dim(v, p.dim), None
    norm = norm_except_dim(v.detach(), p.dim)
    clamped = norm == 0 if p.eps < 0 else norm < p.bound
    norm = norm_except_dim(torch.where(clamped, 1.0, v), p.dim)
    return norm if p.eps < 0 else torch.where(clamped, p.bound, norm), clamped
