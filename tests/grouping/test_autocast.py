"""``fuse(model, autocast=True)``: weights in autocast's dtype, with the bits of the cast."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import wnkernel

from .. import reference
from ..groups import (
    Computed,
    Net,
    assert_same,
    assert_same_tensors,
    both_modes,
    gradients,
    twins,
    weights,
)

LOW = [torch.bfloat16, torch.float16]
all_low = pytest.mark.parametrize("low", LOW, ids=str)


def autocast(dtype: torch.dtype = torch.bfloat16, enabled: bool = True) -> torch.autocast:
    return torch.autocast(torch.empty(0).device.type, dtype=dtype, enabled=enabled)


class Wide(nn.Sequential):
    """Rows long enough for every way of summing them, in every dim."""

    def __init__(self) -> None:
        norm = wnkernel.weight_norm
        super().__init__(
            norm(nn.Conv1d(3, 64, 3, padding=1)),
            nn.Tanh(),
            norm(nn.Conv1d(64, 64, 7, padding=3), dim=1),
            nn.Tanh(),
            norm(nn.Conv1d(64, 64, 3, padding=1)),
            nn.Tanh(),
            norm(nn.ConvTranspose1d(64, 3, 4), dim=2),
            nn.Tanh(),
            norm(nn.Linear(19, 5), dim=None),
        )

    def forward(self) -> torch.Tensor:
        return super().forward(torch.linspace(-1, 1, 96).view(2, 3, 16))


both_builds = pytest.mark.parametrize("build", [Wide, Net], ids=["float32", "mixed"])


@all_low
@both_modes
@both_builds
@pytest.mark.parametrize("scope", [True, False], ids=["scope", "no scope"])
def test_weights_have_the_bits_of_the_cast(route, scope, build, reuse, low):
    model, twin, group = twins(reuse, build, autocast=True)
    with autocast(low), group.scope() if scope else nullcontext():
        for (name, w), want in zip(weights(model).items(), weights(twin).values(), strict=True):
            if want.dtype == torch.float64:  # autocast leaves it alone
                assert_same(w, want, name)
            else:
                assert w.dtype == low or want.dtype != torch.float32, name
                assert_same(w.to(low), want.to(low), name)


@all_low
@both_modes
@both_builds
def test_gradients_have_the_bits_of_the_cast(route, build, reuse, low):
    model, twin, _ = twins(reuse, build, autocast=True)
    for _ in range(2):
        outputs = []
        for module in (model, twin):
            module.zero_grad()
            with autocast(low):
                outputs.append(module())
            outputs[-1].float().square().sum().backward()
        assert_same(*outputs)
        assert_same_tensors(gradients(model), gradients(twin))


@both_modes
def test_outside_autocast_nothing_changes(route, reuse):
    model, twin, group = twins(reuse, autocast=True)
    with autocast():
        model()
    for context in (nullcontext(), autocast(enabled=False), group.scope()):
        with context:
            for w, want in zip(weights(model).values(), weights(twin).values(), strict=True):
                assert_same(w, want)
    assert_same(model(), twin())


@both_modes
def test_without_the_option_nothing_changes(route, reuse):
    model, twin, group = twins(reuse)
    with autocast(), group.scope():
        for w, want in zip(weights(model).values(), weights(twin).values(), strict=True):
            assert_same(w, want)
        assert_same(model(), twin())


@both_modes
def test_each_dtype_has_a_launch_of_its_own(route, computed: Computed, reuse):
    model, _, group = twins(reuse, build=Wide, autocast=True)
    with group.scope():
        for _ in range(2):
            for dtype in LOW:
                with autocast(dtype):
                    assert model[0].weight.dtype == dtype
                    with autocast(enabled=False):
                        assert model[0].weight.dtype == torch.float32
    assert computed.take() == ([5, 5, 5], 0)


@both_modes
def test_without_gradients(route, reuse):
    model, twin, _ = twins(reuse, build=Wide, autocast=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), autocast():
            assert_same(model(), twin())


def test_gradients_of_a_weight_used_twice_add_up_in_that_dtype(route):
    model, _, group = twins(build=Wide, autocast=True)
    layer = model[2]
    with autocast(), group.scope():
        uses = [layer.weight, layer.weight]
    assert uses[0] is uses[1]
    grads = [torch.randn_like(w) for w in uses]
    torch.autograd.backward(uses, grads)
    g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    assert grads[0].dtype == torch.bfloat16
    expected = reference.backward(v, g, grads[0] + grads[1], 1)
    for p, want in zip((v, g), expected, strict=True):
        reference.assert_close("gradient", p.grad, want)


def test_a_copy_has_the_option_too(route):
    model, twin, _ = twins(build=Wide, autocast=True)
    copied = copy.deepcopy(model)
    with autocast():
        assert copied[0].weight.dtype == torch.bfloat16
        assert_same(copied(), twin())
