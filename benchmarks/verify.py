"""Checks results against float64 before they are timed, with the bounds of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wnkernel.cli.exact import Exact, bound, exact, of_sums

from .contenders import OWN, WAYS, NormedLayer, Of, Pass
from .environment import Environment

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
    """Compare ``(w, grad_v, grad_g)`` with the reference for the same inputs. Return the largest
    relative L2 error. (For ``long_sums`` see :func:`wnkernel.cli.exact.bound`.)

    The L2 error of w is relative to w, that of ``grad_v`` to its terms, that of ``grad_g`` to the
    norm of the row of ``grad_w``. The error of the worst element is relative to the largest one.
    Raises VerificationError if a result is outside the tolerance, not finite, or of another shape.
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


@dataclass(frozen=True)
class Scaled:
    """Rows of a tensor and the norm to reach. ``eps`` times that norm is added to their own."""

    v: Tensor
    norm: float
    dim: int | None
    eps: float


def check_scaled(who: str, got: Tensor, want: Scaled, *, long_sums: bool) -> float:
    """Compare rows that were scaled in place with the formula in float64. Return the largest error
    of a row relative to its norm. (For ``long_sums`` see :func:`wnkernel.cli.exact.bound`.)"""
    v = want.v.double()
    others = [k for k in range(v.ndim) if k != want.dim]
    norm = torch.linalg.vector_norm(v, dim=others, keepdim=True)
    scaled = v * (want.norm / (norm + want.eps * want.norm))
    errors = torch.linalg.vector_norm(_difference(who, "w", got, scaled), dim=others)
    worst = _ratio(errors.max(), torch.tensor(want.norm))
    of_l2 = bound(got.dtype, v.numel() // norm.numel(), long_sums=long_sums)
    _demand(who, "w", "largest error relative to the norm of its row", worst, of_l2)
    return worst


def check_forced(
    who: str,
    got: Sequence[Tensor],
    start: Tensor,
    grad_w: Tensor,
    eps: float,
    *,
    long_sums: bool,
) -> float:
    """Compare ``(v, w)`` or ``(v, w, grad_v)`` of a forced weight norm of ``start`` along dim 0
    with the formula in float64. Return the largest error of a row relative to the norm of that row,
    or for ``grad_v`` of its terms. (For ``long_sums`` see :func:`wnkernel.cli.exact.bound`.)"""

    def rms(t: Tensor) -> Tensor:
        return t.square().flatten(1).mean(1).sqrt().view(-1, *[1] * (t.ndim - 1))

    length = start[0].numel()
    v = start.double() / (rms(start.double()) + eps)
    v.requires_grad_()
    scale = length**-0.5 / (rms(v) + eps)
    w = v * scale
    (grad_v,) = torch.autograd.grad(w, v, grad_w.double())
    terms = scale.detach() * grad_w
    bound_of_row = bound(start.dtype, length, long_sums=long_sums)
    worst = 0.0
    wanted = ((v.detach(), v.detach()), (w.detach(), w.detach()), (grad_v, terms))
    for name, have, (should, size) in zip(("v", "w", "grad_v"), got, wanted, strict=False):
        errors = _difference(who, name, have, should).flatten(1).norm(dim=1)
        error = float((errors / size.flatten(1).norm(dim=1)).max())
        _demand(who, name, "largest error relative to the norm of its row", error, bound_of_row)
        worst = max(worst, error)
    return worst


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


class Checker:
    """Checks the weights and gradients of one contender after the other against float64. It keeps
    the last results within each tolerance, so that equal bits are not checked again."""

    def __init__(self, title: str, where: Environment) -> None:
        self._title, self._own_kernels = title, where.own_kernels
        self._passed: dict[bool, tuple[list[Tensor], float]] = {}

    def check(
        self, who: str, layers: Sequence[NormedLayer], results: Sequence[Of], grads: list[Tensor]
    ) -> float:
        """Return the worst error of all layers. Weights of a group must be computed together."""
        way = WAYS[who]
        nodes = {of.w.grad_fn for of in results}
        if len(nodes) != (1 if way.compiled or way.reuse else len(results)):
            raise VerificationError(
                f"{who}, {self._title}: {len(results)} weights have {len(nodes)} autograd nodes"
            )
        long_sums = who not in OWN or not self._own_kernels
        bits = [t.detach() for of in results for t in of]
        passed, worst = self._passed.get(long_sums, ([], 0.0))
        if passed and all(map(torch.equal, bits, passed)):
            return worst
        worst = 0.0
        for i, (layer, of, grad_w) in enumerate(zip(layers, results, grads, strict=True)):
            want = reference(layer.v, layer.g, layer.dim, grad_w)
            about = f"{who}, {self._title}, weight {i} of shape {list(layer.v.shape)}"
            worst = max(worst, check(about, of, want, long_sums=long_sums))
        self._passed[long_sums] = bits, worst
        return worst

    def check_pass(self, who: str, one: Pass) -> float:
        """Check the results of a pass or an iteration."""
        grads = [g.clone() for g in one.grads]
        results = one.results()
        if not all(map(torch.equal, grads, one.grads)):
            raise VerificationError(f"{who}, {self._title}: the backward wrote to its input")
        return self.check(who, one.normed.layers, results, grads)
