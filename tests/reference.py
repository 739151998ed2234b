"""The oracle, in float64 from the same inputs, and the only tolerance table of the tests.

A comparison passes when

- every element is within ``element`` of the oracle, relative to the size of the terms that the
  element is a sum of (``Expected.scale``), so that cancellation is no excuse and no trap;
- the whole error is within ``l2``, tighter than ``element`` because rounding averages out;
- the directions agree as far as an error of ``l2`` lets them.

tests/core/test_mutants.py shows what these bounds refuse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def bits(t: Tensor) -> Tensor:
    """As integers, for comparisons without tolerance: NaN is NaN, 0 is not -0."""
    return t.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


@dataclass(frozen=True)
class Expected:
    """A float64 result and what its rounding errors are proportional to."""

    value: Tensor
    scale: Tensor
    length: int
    """Elements in the reduction behind it."""
    acc_dtype: torch.dtype
    """The dtype that the contract promises for reductions."""


@dataclass(frozen=True)
class Tolerance:
    element: float
    l2: float


def tolerance(dtype: torch.dtype, acc_dtype: torch.dtype, length: int) -> Tolerance:
    """The table. ``eps`` of the result is the distance between neighbours, so correct rounding
    costs half of it; a chunked sum of ``length`` products in ``acc_dtype`` errs by at most about
    the square root of ``length`` times its eps, and enters a gradient up to four times."""
    acc = torch.finfo(acc_dtype).eps
    rounding = max(torch.finfo(dtype).eps, acc)
    reduction = 4 * math.sqrt(max(length, 1)) * acc
    return Tolerance(element=2 * rounding + reduction, l2=rounding + reduction)


def assert_close(name: str, got: Tensor, expected: Expected) -> None:
    """Compare by the table for ``got.dtype``. NaN and inf have to be where the oracle has them."""
    want, scale = expected.value, expected.scale
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, not {list(want.shape)}"
    limit = tolerance(got.dtype, expected.acc_dtype, expected.length)
    wide = got.detach().to(torch.float64)
    finite = want.isfinite()
    assert torch.equal(wide[~finite].nan_to_num(0.5), want[~finite].nan_to_num(0.5)), (
        f"{name}: other NaN or inf values than the oracle"
    )
    wide, want, scale = wide[finite], want[finite], scale[finite]
    if want.numel() == 0:
        return
    assert wide.isfinite().all(), f"{name}: {(~wide.isfinite()).sum()} elements are not finite"
    infos = torch.finfo(got.dtype), torch.finfo(expected.acc_dtype)
    smallest = max(info.smallest_normal * info.eps for info in infos)
    error = (wide - want).abs()
    excess = (error - smallest) / (limit.element * scale).clamp_min(torch.finfo(torch.float64).tiny)
    worst = int(excess.argmax())
    assert excess[worst] <= 1, (
        f"{name}: {wide[worst]:.9g} for {want[worst]:.9g}, {excess[worst]:.3g} times the bound of "
        f"{limit.element:.2g} relative to {scale[worst]:.3g}; {int((excess > 1).sum())} of "
        f"{want.numel()} elements are outside"
    )
    # Scaled by the largest term: squares of 1e200 would leave float64.
    unit = scale.max()
    if unit == 0:
        return
    total = (error / unit).norm()
    allowed = limit.l2 * (scale / unit).norm() + smallest / unit * math.sqrt(want.numel())
    assert total <= allowed, f"{name}: L2 error {total / allowed:.3g} times the bound"
    length = (want / unit).norm()
    if length > 100 * allowed:
        cosine = torch.dot(wide / unit, want / unit) / ((wide / unit).norm() * length)
        # The cosine's own sums are rounded as many times as there are elements.
        slack = (allowed / length) ** 2 + 8 * math.sqrt(want.numel()) * torch.finfo(want.dtype).eps
        assert 1 - cosine <= slack, f"{name}: cosine {cosine:.12g}"


def weight_norm(v: Tensor, g: Tensor, dim: int | None, eps: float = 0.0) -> Tensor:
    """``v * (g / max(norm(v), eps))`` in float64, differentiable to any order."""
    v, g = v.to(torch.float64), g.to(torch.float64)
    return v * (g / norm(v, dim).clamp_min(eps))


def norm(v: Tensor, dim: int | None) -> Tensor:
    """Norms in float64, of g's shape. A power of two per row keeps 1e200 in range, exactly."""
    v = v.to(torch.float64)
    whole = dim is None or dim == -1
    others = [k for k in range(v.ndim) if whole or k != dim % v.ndim]
    if v.numel() == 0 or not others:
        n = v.square().sum(others, keepdim=True).sqrt() if others else v.abs()
    else:
        largest = v.detach().abs().amax(others, keepdim=True)
        exponent = torch.frexp(torch.where(largest.isfinite(), largest, 1.0)).exponent
        # Before torch 2.8 or so ldexp with an integer exponent goes through a float32 power.
        unit = torch.ldexp(torch.ones_like(largest), exponent.to(torch.float64))
        n = torch.linalg.vector_norm(v / unit, 2, others, keepdim=True) * unit
    return n.reshape(()) if whole else n


def forward(v: Tensor, g: Tensor, dim: int | None, eps: float = 0.0) -> Expected:
    """What w has to be."""
    with torch.no_grad():
        w = v.to(torch.float64) * (g.to(torch.float64) / divisor(v, g, dim).clamp_min(eps))
        return Expected(w, w.abs(), length(v, dim), acc_dtype(v))


def divisor(v: Tensor, g: Tensor, dim: int | None) -> Tensor:
    """Norms, but for one norm over all of v where v and g have half dtypes. Its value in g's dtype
    then, by way of float32, if that is a normal number."""
    n, halves = norm(v, dim), (torch.float16, torch.bfloat16)
    if g.numel() != 1 or v.dtype not in halves or g.dtype not in halves:
        return n
    rounded, info = n.to(torch.float32).to(g.dtype).to(torch.float64), torch.finfo(g.dtype)
    return torch.where((rounded >= info.smallest_normal) & (rounded <= info.max), rounded, n)


def backward(
    v: Tensor, g: Tensor, grad_w: Tensor, dim: int | None, eps: float = 0.0
) -> tuple[Expected, Expected]:
    """What grad_v and grad_g have to be, by autograd through :func:`weight_norm`."""
    acc, count = acc_dtype(v), length(v, dim)
    v, g = (t.detach().to(torch.float64).requires_grad_() for t in (v, g))
    grad_w = grad_w.detach().to(torch.float64)
    grad_v, grad_g = torch.autograd.grad(weight_norm(v, g, dim, eps), (v, g), grad_w)
    with torch.no_grad():
        # The terms of grad_v = (g / n) (grad_w - u <grad_w, u>) and grad_g = <grad_w, u>.
        n = norm(v, dim).clamp_min(eps)
        u = v / n
        terms = grad_w * u
        s = terms.abs().sum_to_size(g.shape) if terms.numel() else torch.zeros_like(g)
        scale_v = g.abs() / n * (grad_w.abs() + u.abs() * s)
    return Expected(grad_v, scale_v, count, acc), Expected(grad_g, s, count, acc)


def length(v: Tensor, dim: int | None) -> int:
    return v.numel() if dim is None or dim == -1 else v.numel() // max(v.shape[dim], 1)


def acc_dtype(v: Tensor) -> torch.dtype:
    return torch.float64 if v.dtype == torch.float64 else torch.float32
