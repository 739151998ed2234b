"""Nothing is timed before its result is right: a float64 reference and the tolerances.

The reference is composed of plain operators and differentiated by autograd, in float64, from the
same inputs. It shares no formula with what it checks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class VerificationError(Exception):
    """A contender gives wrong numbers; there is nothing to time."""


@dataclass(frozen=True)
class Tolerance:
    """Bounds of the error, relative to the reference."""

    l2: float
    """Of the whole tensor; of ``grad_g`` relative to the norm of the row of ``grad_w``."""
    element: float
    """Of the worst element, relative to the largest of the reference."""


def tolerance(dtype: torch.dtype, row_length: int, *, long_sums: bool) -> Tolerance:
    """Half a rounding of the result, and what the sums over a row may lose.

    Args:
        dtype: of the tensors.
        row_length: elements per norm.
        long_sums: whether the contender may sum a row in long runs, as torch's operators do: their
            error grows with the root of the length (6e-4 was seen in float32 for one norm over 17 M
            elements). Without it, sums have to be cut into chunks, and a row's length is no excuse.
    """
    accumulation = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    sums = accumulation * (64 + (2 * math.sqrt(row_length) if long_sums else 0))
    rounding = torch.finfo(dtype).eps
    return Tolerance(l2=rounding / 2 + sums, element=rounding + 4 * sums)


@dataclass(frozen=True)
class Reference:
    """``w``, ``grad_v`` and ``grad_g`` in float64, and the scale of the errors of ``grad_g``."""

    w: Tensor
    grad_v: Tensor
    grad_g: Tensor
    grad_w_norm: Tensor
    dtype: torch.dtype
    row_length: int


def reference(v: Tensor, g: Tensor, dim: int | None, grad_w: Tensor) -> Reference:
    """What weight norm and its gradients are, computed the plain way."""
    v64 = v.detach().double().requires_grad_()
    g64 = g.detach().double().requires_grad_()
    grad64 = grad_w.detach().double()
    dims = [k for k in range(v.ndim) if k != dim]
    keepdim = dim is not None
    w = v64 * (g64 / torch.linalg.vector_norm(v64, dim=dims, keepdim=keepdim))
    grad_v, grad_g = torch.autograd.grad(w, (v64, g64), grad64)
    grad_w_norm = torch.linalg.vector_norm(grad64, dim=dims, keepdim=keepdim)
    rows = 1 if dim is None else v.shape[dim]
    return Reference(w.detach(), grad_v, grad_g, grad_w_norm, v.dtype, v.numel() // max(rows, 1))


def check(who: str, got: Sequence[Tensor], want: Reference, *, long_sums: bool) -> float:
    """Compare ``(w, grad_v, grad_g)`` with the reference.

    Args:
        who: contender and case, for the message.
        got: ``w``, ``grad_v``, ``grad_g``.
        want: the reference for the same inputs.
        long_sums: see :func:`tolerance`.

    Returns:
        The largest relative L2 error of the three, for the record.

    Raises:
        VerificationError: outside the tolerance, not finite, or of another shape.
    """
    bound = tolerance(want.dtype, want.row_length, long_sums=long_sums)
    w, grad_v, grad_g = (t.detach() for t in got)
    worst = 0.0
    for name, have, should in (("w", w, want.w), ("grad_v", grad_v, want.grad_v)):
        error = _difference(who, name, have, should)
        l2 = _ratio(error.norm(), should.norm())
        element = _ratio(error.abs().max(), should.abs().max())
        _demand(who, name, "relative L2 error", l2, bound.l2)
        _demand(who, name, "largest error of an element", element, bound.element)
        worst = max(worst, l2)
    error = _difference(who, "grad_g", grad_g, want.grad_g).abs()
    relative = float((error / want.grad_w_norm.clamp_min(torch.finfo(torch.float64).tiny)).max())
    _demand(who, "grad_g", "largest error relative to |grad_w| of its row", relative, bound.l2)
    return max(worst, relative)


def check_same(who: str, got: Tensor, want: Tensor, l2: float) -> None:
    """Compare the outputs of two whole models by relative L2.

    Raises:
        VerificationError: they differ by more than ``l2``, or are not finite.
    """
    error = _difference(who, "output", got.detach(), want.detach().double())
    _demand(who, "output", "relative L2 difference", _ratio(error.norm(), want.norm()), l2)


def _difference(who: str, name: str, have: Tensor, should: Tensor) -> Tensor:
    if have.shape != should.shape:
        raise VerificationError(
            f"{who}: {name} has shape {list(have.shape)}, expected {list(should.shape)}"
        )
    return have.double() - should


def _ratio(error: Tensor, scale: Tensor) -> float:
    return float(error) / max(float(scale), torch.finfo(torch.float64).tiny)


def _demand(who: str, name: str, what: str, value: float, bound: float) -> None:
    if not value <= bound:  # NaN fails too
        raise VerificationError(
            f"{who}: {name} is wrong: {what} is {value:.3g}, allowed is {bound:.3g}. "
            "Nothing was timed for this case."
        )
