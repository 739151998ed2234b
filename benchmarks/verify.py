"""Checks results against float64 before they are timed, with the bounds of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wnkernel.cli.exact import Exact, bound, exact, of_sums

TINY = torch.finfo(torch.float64).tiny


class VerificationError(Exception):
    """A contender gives wrong numbers, so it is not timed."""


@dataclass(frozen=True)
class Reference(Exact):
    """The weight norm, its gradients, and the inputs that they belong to."""

    dtype: torch.dtype
    row_length: int


def reference(v: Tensor, g: Tensor, dim: int | None, grad_w: Tensor) -> Reference:
    """Return the reference of one weight, on its device."""
    rows = 1 if dim is None else v.shape[dim]
    want = exact(v, g, dim, grad_w)
    return Reference(**vars(want), dtype=v.dtype, row_length=v.numel() // max(rows, 1))


def check(who: str, got: Sequence[Tensor], want: Reference, *, long_sums: bool) -> float:
    """Compare ``(w, grad_v, grad_g)`` with the reference.

    The L2 error of w is relative to w, that of ``grad_v`` to its terms, that of ``grad_g`` to the
    norm of the row of ``grad_w``. The error of the worst element is relative to the largest
    element.

    Args:
        who: contender and case, for the message.
        got: ``w``, ``grad_v``, ``grad_g``.
        want: the reference for the same inputs.
        long_sums: see :func:`wnkernel.cli.exact.bound`.

    Returns:
        The largest relative L2 error of the three.

    Raises:
        VerificationError: if a result is outside the tolerance, not finite, or of another shape.
    """
    about = want.dtype, want.row_length
    of_l2 = bound(*about, long_sums=long_sums)
    of_element = torch.finfo(want.dtype).eps + 4 * of_sums(*about, long_sums=long_sums)
    w, grad_v, grad_g = (t.detach() for t in got)
    worst = 0.0
    for name, have, should, terms in (
        ("w", w, want.w, want.w),
        ("grad_v", grad_v, want.grad_v, want.grad_v_terms),
    ):
        error = _difference(who, name, have, should)
        l2 = _ratio(error.norm(), terms.norm())
        element = _ratio(error.abs().max(), terms.abs().max())
        _demand(who, name, "relative L2 error", l2, of_l2)
        _demand(who, name, "largest error of an element", element, of_element)
        worst = max(worst, l2)
    error = _difference(who, "grad_g", grad_g, want.grad_g).abs()
    relative = float((error / want.grad_w_norm.clamp_min(TINY)).max())
    _demand(who, "grad_g", "largest error relative to |grad_w| of its row", relative, of_l2)
    return max(worst, relative)


def check_same(who: str, got: Tensor, want: Tensor, l2: float, what: str = "output") -> None:
    """Compare the results of two whole models by their relative L2 difference."""
    error = _difference(who, what, got.detach(), want.detach().double())
    _demand(who, what, "relative L2 difference", _ratio(error.norm(), want.norm()), l2)


def _difference(who: str, name: str, have: Tensor, should: Tensor) -> Tensor:
    if have.shape != should.shape:
        shapes = f"{list(have.shape)}, expected {list(should.shape)}"
        raise VerificationError(f"{who}: {name} has shape {shapes}")
    return have.double() - should


def _ratio(error: Tensor, scale: Tensor) -> float:
    return float(error) / max(float(scale), TINY)


def _demand(who: str, name: str, what: str, value: float, bound: float) -> None:
    if not value <= bound:  # NaN fails too
        raise VerificationError(
            f"{who}: {name} is wrong: {what} is {value:.3g}, allowed is {bound:.3g}. "
            "Nothing was timed for this case."
        )
