"""Batch norms that torch fuses with weight-normed layers: the fused layer keeps its weight norm,
with g and v that give the fused weight, and what it was made of stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import fuse_modules
from torch.ao.quantization.quantize_fx import fuse_fx
from torch.fx.experimental import optimization
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import wnkernel

from ..layers import originals
from ..small_models import ramp

# id -> (layer, its batch norm, shape of the input, how they are fused)
CASES: dict[str, tuple[Callable, Callable, tuple[int, ...], Callable]] = {
    "Linear": (lambda: nn.Linear(3, 4), lambda: nn.BatchNorm1d(4), (5, 3), fuse_linear_bn_eval),
    "Conv1d": (lambda: nn.Conv1d(3, 4, 2), lambda: nn.BatchNorm1d(4), (2, 3, 6), fuse_conv_bn_eval),
    "Conv2d without bias": (
        lambda: nn.Conv2d(3, 4, 2, bias=False),
        lambda: nn.BatchNorm2d(4),
        (2, 3, 5, 5),
        fuse_conv_bn_eval,
    ),
    "Conv2d grouped": (
        lambda: nn.Conv2d(4, 4, 2, groups=2),
        lambda: nn.BatchNorm2d(4, affine=False),
        (2, 4, 5, 5),
        fuse_conv_bn_eval,
    ),
    "Conv3d": (
        lambda: nn.Conv3d(2, 4, 2),
        lambda: nn.BatchNorm3d(4),
        (2, 2, 3, 3, 3),
        fuse_conv_bn_eval,
    ),
    "ConvTranspose1d": (
        lambda: nn.ConvTranspose1d(3, 4, 2),
        lambda: nn.BatchNorm1d(4),
        (2, 3, 6),
        lambda conv, norm: fuse_conv_bn_eval(conv, norm, transpose=True),
    ),
}
all_cases = pytest.mark.parametrize("case", CASES)
all_dims = pytest.mark.parametrize("dim", [0, 1, None])


def normed(layer: nn.Module, dim: int | None = 0) -> nn.Module:
    """A layer whose g is not the norm of its v."""
    wnkernel.weight_norm(layer, dim=dim)
    with torch.no_grad():
        originals(layer)[0].mul_(1.5)
    return layer


def batch_norm(norm: Any) -> Any:
    """One that has seen data."""
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
        if norm.affine:
            norm.weight.normal_()
            norm.bias.normal_()
    return norm


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    now = model.state_dict()
    assert list(now) == list(before)
    assert all(torch.equal(now[key], t) for key, t in before.items())


@all_dims
@all_cases
def test_one_layer(case, dim):
    layer, norm, shape, fuse = CASES[case]
    layer, norm = normed(layer(), dim).eval(), batch_norm(norm()).eval()
    want, before = norm(layer(ramp(*shape))), copy.deepcopy(layer.state_dict())
    fused = fuse(layer, norm)
    close(fused(ramp(*shape)), want)
    assert type(fused.parametrizations.weight[0]) is wnkernel.WeightNorm
    assert fused.parametrizations.weight[0].dim == (-1 if dim is None else dim)
    assert_unchanged(layer, before)
    fused(ramp(*shape)).square().sum().backward()
    assert all(p.grad is not None for p in originals(fused))
    assert all(p.grad is None for p in layer.parameters())
    wnkernel.fold(fused)
    close(fused(ramp(*shape)), want)


@all_cases
def test_a_channel_that_the_batch_norm_has_switched_off(case):
    """A row of zeros, of which no weight norm knows the direction. Pruned models have many, and
    residual blocks begin with nothing else."""
    layer, norm, shape, fuse = CASES[case]
    layer, norm = normed(layer()).eval(), batch_norm(norm()).eval()
    if norm.affine:
        with torch.no_grad():
            norm.weight[1] = 0.0
    want = norm(layer(ramp(*shape)))
    fused = fuse(layer, norm)
    close(fused(ramp(*shape)), want)
    fused(ramp(*shape)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in originals(fused))


def test_a_frozen_layer_stays_frozen():
    layer = normed(nn.Linear(3, 4)).requires_grad_(False).eval()
    fused = fuse_linear_bn_eval(layer, batch_norm(nn.BatchNorm1d(4)).eval())
    assert not any(p.requires_grad for p in originals(fused))


@all_dims
@pytest.mark.parametrize("as_parameter", [True, False])
def test_zeros_assigned_by_hand(as_parameter, dim):
    layer, w = normed(nn.Conv2d(3, 4, 2), dim), torch.randn(4, 3, 2, 2)
    w[1], w[:, 2] = 0.0, 0.0
    if dim is None:
        w.zero_()
    kept = w.clone()
    layer.weight = nn.Parameter(w) if as_parameter else w
    torch.testing.assert_close(layer.weight, kept)
    assert torch.equal(w, kept)
    layer(ramp(2, 3, 5, 5)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in originals(layer))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = normed(nn.Conv2d(3, 4, 2)), batch_norm(nn.BatchNorm2d(4))
        self.up = normed(nn.ConvTranspose2d(4, 6, 2), dim=1)
        self.linear, self.last = normed(nn.Linear(6, 5)), batch_norm(nn.BatchNorm1d(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.norm(self.conv(x)).relu())
        return self.last(self.linear(x.flatten(2).mean(-1)))


def net(how: str) -> tuple[Net, Tensor]:
    """A model, one by one or in a group, and its output."""
    torch.manual_seed(0)
    model = Net().eval()
    want = model(ramp(2, 3, 5, 5))
    if how == "fused":
        wnkernel.fuse(model)
    return model, want


all_nets = pytest.mark.parametrize("how", ["one by one", "fused"])


@all_nets
@pytest.mark.parametrize(
    "fuse", [fuse_fx, lambda m: fuse_modules(m, [["conv", "norm"], ["linear", "last"]])]
)
def test_torchs_fusing_of_a_model_keeps_what_it_computes(fuse, how):
    model, want = net(how)
    before = copy.deepcopy(model.state_dict())
    fused = fuse(model)
    close(fused(ramp(2, 3, 5, 5)), want)
    assert not any(
        isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in fused.modules() if m is not fused
    )
    assert_unchanged(model, before)
    assert torch.equal(model(ramp(2, 3, 5, 5)), want)
    assert len(wnkernel.fold(fused)) == 3
    close(fused(ramp(2, 3, 5, 5)), want)


@all_nets
def test_symbolic_traces(how):
    """torch.fx's own passes look for layers by their types: they leave weight-normed ones alone,
    and fuse folded ones."""
    model, want = net(how)
    assert torch.equal(torch.fx.symbolic_trace(model)(ramp(2, 3, 5, 5)), want)
    for optimize in (optimization.fuse, optimization.optimize_for_inference):
        untouched = optimize(model)
        assert torch.equal(untouched(ramp(2, 3, 5, 5)), want)
        assert isinstance(untouched.norm, nn.BatchNorm2d)
    wnkernel.fold(model)
    fused = optimization.fuse(model)
    assert not hasattr(fused, "norm")
    close(fused(ramp(2, 3, 5, 5)), want)
