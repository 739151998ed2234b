"""Groups of models that are not a plain tree of layers, and of several models at once."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import wnkernel

from ..groups import (
    Computed,
    Context,
    assert_plain,
    assert_same,
    assert_same_models,
    assert_same_tensors,
    assert_same_training,
    both_modes,
    ramp,
    triple,
    twins,
)

# Shapes of models


class SharedLayer(nn.Module):
    """One layer under two names, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = wnkernel.weight_norm(nn.Linear(5, 5))
        self.other = wnkernel.weight_norm(nn.Linear(5, 5), dim=1)
        self.second = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.other(torch.tanh(self.first(x)))))


@both_modes
def test_a_layer_under_two_names(route, computed: Computed, reuse):
    model, twin, group = twins(reuse, SharedLayer)
    assert group.layers == ["first.weight", "other.weight"]
    computed.take()
    model(ramp(2, 5))
    assert computed.take() == ([2], 0)
    assert_same_training(model, twin, ramp(2, 5), once=parametrize.cached)


class TiedLayers(nn.Module):
    """Two layers with the same v, each with its own g."""

    def __init__(self) -> None:
        super().__init__()
        self.first = wnkernel.weight_norm(nn.Linear(5, 5))
        self.second = wnkernel.weight_norm(nn.Linear(5, 5))
        self.second.parametrizations.weight.original1 = self.first.parametrizations.weight.original1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


@both_modes
def test_layers_that_share_a_parameter(route, computed: Computed, reuse):
    model, twin, group = twins(reuse, TiedLayers)
    assert len(group.layers) == 2
    assert_same_training(model, twin, ramp(2, 5))
    computed.take()
    model(ramp(2, 5))
    assert computed.take() == ([2], 0)


class Recurrent(nn.LSTM):
    """Several weight norms on one module, which is the root."""

    def __init__(self) -> None:
        super().__init__(4, 5, num_layers=2, bidirectional=True)
        for name in [name for name, _ in self.named_parameters() if "weight" in name]:
            wnkernel.weight_norm(self, name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[0]


@both_modes
def test_several_weights_of_one_layer(route, computed: Computed, reuse):
    model, twin, group = twins(reuse, Recurrent)
    assert len(group.layers) == 8
    assert "weight_hh_l1_reverse" in group.layers
    computed.take()
    model(ramp(3, 2, 4))
    assert computed.take() == ([8], 0)
    assert_same_training(model, twin, ramp(3, 2, 4))


@both_modes
def test_a_model_that_is_one_layer(route, computed: Computed, reuse):
    model, twin, group = twins(reuse, lambda: wnkernel.weight_norm(nn.Linear(5, 4)))
    assert group.layers == ["weight"]
    computed.take()
    model(ramp(2, 5))
    assert computed.take() == ([1], 0)
    assert_same_training(model, twin, ramp(2, 5))


@pytest.mark.parametrize("kind", [nn.ModuleList, lambda m: nn.ModuleDict({"a": m[0], "b": m[1]})])
def test_a_model_without_a_forward(computed: Computed, kind):
    model = kind([wnkernel.weight_norm(nn.Linear(5, 4)) for _ in range(2)])
    group = wnkernel.fuse(model)
    layers = list(model.children())
    with group.scope():
        for module in layers:
            module(ramp(2, 5))
    assert computed.take() == ([2], 0)
    group.remove()
    assert_plain(model)


@both_modes
def test_parts_with_groups_of_their_own(route, computed: Computed, reuse):
    model, twin, whole = twins(reuse)
    whole.remove()
    groups = [wnkernel.fuse(model.front, reuse=reuse), wnkernel.fuse(model.back)]
    computed.take()
    model()
    assert computed.take() == ([3, 3], 1)
    triple(model), triple(twin)
    assert_same_models(model, twin)
    with groups[0].scope(), groups[1].scope():
        assert_same(model(), twin())
    groups[0].remove()
    assert len(groups[1].layers) == 3
    assert_same_models(model, twin)


# A training step of two models


def networks() -> nn.ModuleDict:
    norm = wnkernel.weight_norm
    generator = nn.Sequential(norm(nn.Linear(6, 8)), nn.Tanh(), norm(nn.Linear(8, 12), dim=1))
    critic = nn.Sequential(norm(nn.Linear(12, 8)), nn.Tanh(), norm(nn.Linear(8, 1), dim=None))
    return nn.ModuleDict({"generator": generator, "critic": critic})


def train(both: nn.ModuleDict, once: Context) -> list[float]:
    """Losses of a few steps; ``once``: what surrounds the critic's two forwards of its own step."""
    generator, critic = both["generator"], both["critic"]
    optimizers = [torch.optim.AdamW(m.parameters(), fused=True) for m in (critic, generator)]
    softplus = nn.functional.softplus
    losses = []
    for step in range(4):
        fake = generator(ramp(4, 6))
        with once():
            loss = softplus(critic(fake.detach())) + softplus(-critic(ramp(4, 12) * (step + 1)))
        losses.append(loss.mean())
        optimizers[0].zero_grad()
        losses[-1].backward()
        optimizers[0].step()
        critic.requires_grad_(False)
        losses.append(softplus(-critic(fake)).mean())
        optimizers[1].zero_grad()
        losses[-1].backward()
        optimizers[1].step()
        critic.requires_grad_(True)
    return [float(loss.detach()) for loss in losses]


@both_modes
@pytest.mark.parametrize("whole", [True, False], ids=["one group", "two groups"])
def test_a_generator_and_its_critic(route, computed: Computed, whole, reuse):
    both = networks()
    twin = copy.deepcopy(both)
    for part in [both] if whole else both.values():
        wnkernel.fuse(part, reuse=reuse)
    computed.take()
    losses = train(both, nullcontext)
    assert computed.take() == ([2] * (16 if reuse == "forward" else 12), 0)
    # A weight that serves two forwards is one whose gradients are added up before the norm's.
    once = nullcontext if reuse == "forward" else parametrize.cached
    assert losses == train(twin, once)
    assert_same_tensors(both.state_dict(), twin.state_dict())
