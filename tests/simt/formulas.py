"""The formulas of forced norms and of a negative eps, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..reference import Expected
from .cases import Case, Result


def bounded(norm: Tensor, eps: float) -> Tensor:
    """n = max(norm, eps), or norm - eps if eps is negative."""
    return norm - eps if eps < 0 else norm.clamp_min(eps)


def weight_norm(v: Tensor, g: Tensor, eps: float) -> Tensor:
    """``g * v / n``, in float64."""
    return v * (g / bounded(reference.norm(v, 1), eps))


def assert_close(
    name: str, got: Tensor, want: Tensor, c: Case, scale: Tensor | None = None
) -> None:
    scale = want.abs() if scale is None else scale
    outer, _, inner = c.v.shape
    acc = reference.acc_dtype(c.v)
    reference.assert_close(name, got, Expected(want, scale, outer * inner, acc))


def assert_right_forced(c: Case, r: Result) -> None:
    """v, the norms and w of a forward."""
    v, g = c.v.double(), c.g.double().view(1, -1, 1)
    norm = reference.norm(v, 1)
    eps = c.eps or 5e-324
    factor = c.forced / bounded(norm, eps)
    new_v, new_norm = v * factor, norm * factor
    new_v, new_norm = (torch.where(norm == 0, 0.0, x) for x in (new_v, new_norm))
    w = new_v * torch.where(norm == 0, 0.0, g / bounded(new_norm, eps))
    assert_close("v", r.v, new_v, c)
    assert_close("norm", r.norm.view_as(g), new_norm, c)
    assert_close("w", r.w, w, c)


def assert_right_added(c: Case, r: Result) -> None:
    """Everything that is wanted, where eps is negative."""
    v, g = (t.double().requires_grad_() for t in (c.v, c.g.view(1, -1, 1)))
    grad_w = c.grad_w.double()
    w = weight_norm(v, g, c.eps)
    grad_v, grad_g = torch.autograd.grad(w, (v, g), grad_w)
    with torch.no_grad():
        norm = reference.norm(v, 1)
        n = bounded(norm, c.eps)
        s = (grad_w * v / n).abs().sum_to_size(g.shape)
        # Where v is small beside eps, what is lost of u s n / norm counts beside grad_w only.
        along = ((v / n).abs() * s * n / norm).nan_to_num(0.0, 0.0, 0.0)
        scale = g.abs() / n * (grad_w.abs() + along)
    assert_close("w", r.w, w.detach(), c)
    assert_close("norm", r.norm.view_as(g), norm, c)
    assert_close("grad_v", r.grad_v, grad_v, c, scale)
    assert_close("grad_g", r.grad_g.view_as(g), grad_g, c, s)
