"""Karras et al. 2024 in plain torch: equations 47 and 66 with eps where Algorithm 1 has it, layers
made of them, and what our kernels have to return by these formulas."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import wnkernel
from wnkernel.forced_layers import ForcedWeightNormList

from .. import reference

EPS = 1e-4


def others(v: Tensor, dim: int | None) -> list[int]:
    """The dims that a norm is over."""
    whole = dim is None or dim == -1
    return [k for k in range(v.ndim) if whole or k != dim % v.ndim]


def normalized(v: Tensor, dim: int | None = 0, eps: float = EPS) -> Tensor:
    """``v / (rms(v) + eps)``, where a row of zeros has the gradient of the divisor alone."""
    dims = others(v, dim)
    if not dims:
        return v / (v.abs() + eps)
    norm = torch.linalg.vector_norm(v, 2, dims, keepdim=True)
    return v / (norm * math.sqrt(norm.numel() / v.numel()) + eps)


def weight(v: Tensor, dim: int | None = 0, gain: float = 1.0, eps: float = EPS) -> Tensor:
    return normalized(v, dim, eps) * (gain / math.sqrt(reference.length(v, dim)))


class MPConv(nn.Module):
    """A linear layer or a convolution without a bias, as EDM2 has it."""

    def __init__(self, *shape: int, gain: float = 1.0, eps: float = EPS) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.gain, self.eps = gain, eps

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.weight.copy_(normalized(self.weight, 0, self.eps))
        w = weight(self.weight, 0, self.gain, self.eps)
        return self.apply_weight(x, w)

    def apply_weight(self, x: Tensor, w: Tensor) -> Tensor:
        match w.ndim:
            case 2:
                return functional.linear(x, w)
            case 3:
                return functional.conv1d(x, w, padding=w.shape[-1] // 2)
            case 4:
                return functional.conv2d(x, w, padding=w.shape[-1] // 2)
        raise ValueError(f"shape: expected 2 to 4 dims, got {list(w.shape)}")


class Layer(MPConv):
    """The same, with our weight norm in place of the formulas."""

    def __init__(self, *shape: int, gain: float = 1.0, eps: float = EPS) -> None:
        super().__init__(*shape)
        wnkernel.forced_weight_norm(self, gain=gain, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_weight(x, self.weight)


SHAPES = {
    "linear": ((6, 10), (4, 10)),
    "conv1d": ((6, 5, 3), (2, 5, 7)),
    "conv2d": ((6, 4, 3, 3), (2, 4, 5, 5)),
}
"""Of a weight and of an input."""


def pair(*shape: int, dtype: torch.dtype = torch.float64, **options: float) -> tuple[MPConv, Layer]:
    """A layer of the formulas and one of ours, with equal weights, one of them far too large."""
    plain, ours = MPConv(*shape, **options).to(dtype), Layer(*shape, **options).to(dtype)
    with torch.no_grad():
        plain.weight[0] *= 30
        original(ours).copy_(plain.weight)
    return plain, ours


def original(layer: nn.Module, name: str = "weight") -> nn.Parameter:
    """The parameter v of a layer."""
    return layer.parametrizations[name].original


def forced(model: nn.Module) -> list[nn.Parameter]:
    """v of every forced weight norm of a model."""
    return [m.original for m in model.modules() if isinstance(m, ForcedWeightNormList)]


class Expected(NamedTuple):
    """What a call computes from v: the new v and w."""

    v: reference.Expected
    w: reference.Expected


def expected(
    v: Tensor, dim: int | None, gain: float = 1.0, eps: float = EPS, training: bool = True
) -> Expected:
    """In float64; in training w is that of the new v before it was rounded."""
    length, acc = reference.length(v, dim), reference.acc_dtype(v)
    wide = v.detach().double()
    if training:
        wide = normalized(wide, dim, eps)
    w = weight(wide, dim, gain, eps)
    return Expected(*(reference.Expected(t, t.abs(), length, acc) for t in (wide, w)))


def expected_gradient(
    v: Tensor, grad_w: Tensor, dim: int | None, gain: float = 1.0, eps: float = EPS
) -> reference.Expected:
    """That of w with respect to v, by autograd through the formula; a sum of two terms."""
    wide, grad_w = v.detach().double().requires_grad_(), grad_w.double()
    (grad_v,) = torch.autograd.grad(weight(wide, dim, gain, eps), wide, grad_w)
    with torch.no_grad():
        dims, n = others(v, dim), reference.length(v, dim)
        norm = torch.linalg.vector_norm(wide, 2, dims, keepdim=True) if dims else wide.abs()
        u = wide / torch.where(norm == 0, 1.0, norm)
        along = (grad_w * u).abs()
        along = along.sum(dims, keepdim=True) if dims else along
        scale = abs(gain) / (norm + eps * math.sqrt(n)) * (grad_w.abs() + u.abs() * along)
    return reference.Expected(grad_v, scale, n, reference.acc_dtype(v))


def check(
    v: Tensor,
    dim: int | None = 0,
    gain: float = 1.0,
    eps: float = EPS,
    *,
    training: bool = True,
    grad_w: Tensor | None = None,
) -> Tensor:
    """Call the module on a leaf, look at all that it does, and return the gradient of v."""
    v.requires_grad_()
    before, version, place = v.detach().clone(), v._version, (v.data_ptr(), v.stride())
    norm = wnkernel.ForcedWeightNorm(dim, gain, eps=eps).train(training)
    w = norm(v)
    want = expected(before, dim, gain, eps, training)
    reference.assert_close("w", w, want.w)
    assert w.dtype == v.dtype
    assert (v.data_ptr(), v.stride()) == place
    if training:
        reference.assert_close("v", v, want.v)
        assert v._version == version + 1
    else:
        assert torch.equal(reference.bits(v), reference.bits(before))
        assert v._version == version
    grad_w = torch.randn_like(w) if grad_w is None else grad_w
    (grad,) = torch.autograd.grad(w, v, grad_w)
    assert grad.dtype == v.dtype
    reference.assert_close("grad_v", grad, expected_gradient(v, grad_w, dim, gain, eps))
    return grad


def check_both(
    v: Tensor,
    dim: int | None = 0,
    gain: float = 1.0,
    eps: float = EPS,
    *,
    grad_w: Tensor | None = None,
) -> list[Tensor]:
    """:func:`check` of an evaluation, and then of a training forward, which changes v."""
    return [
        check(v, dim, gain, eps, training=training, grad_w=grad_w) for training in (False, True)
    ]
