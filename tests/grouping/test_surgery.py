"""Surgery on fused models: layers that come, go and change, ``cached`` and ``remove``."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import wnkernel

from ..groups import (
    LAYERS,
    Computed,
    Net,
    assert_plain,
    assert_same,
    assert_same_models,
    assert_same_tensors,
    assert_same_training,
    both_modes,
    gradients,
    layer,
    triple,
    twins,
)
from ..models.test_layer import Doubled, Shifted


@both_modes
def test_layers_added_later_are_computed_alone(route, computed: Computed, reuse):
    model, twin, group = twins(reuse)
    new = wnkernel.weight_norm(nn.Linear(9, 4))
    for module in (model, twin):
        module.head = copy.deepcopy(new)
        module.back.add_module("late", copy.deepcopy(new))
        module.back.inputs["late"] = (3, 9)
    gc.collect()
    assert group.layers == [f"{name}.weight" for name in LAYERS[:-1]]
    computed.take()
    model()
    assert computed.take() == ([6], 2)
    for _ in range(2):
        assert_same_models(model, twin)
        triple(model), triple(twin)
    group.remove()
    wnkernel.fuse(model, reuse=reuse)
    computed.take()
    model()
    assert computed.take() == ([8], 0)
    assert_same_models(model, twin)


@both_modes
def test_layers_taken_out_of_the_model(route, computed: Computed, reuse):
    model, twin, group = twins(reuse)
    model()
    conv = model.front.conv
    for module in (model, twin):
        module.front.conv = nn.Conv1d(4, 6, 3)
        del module.back.image, module.back.inputs["image"]
    model.front.conv.load_state_dict(twin.front.conv.state_dict())
    for _ in range(2):
        assert_same_models(model, twin)
        triple(model), triple(twin)
    group.refresh()
    computed.take()
    with group.scope():
        model()
        weight = conv.weight  # still a member, and still right, without its model
    assert_same(weight, wnkernel.remove_weight_norm(conv).weight.detach().requires_grad_())


def by_wnkernel(module: nn.Module) -> None:
    wnkernel.remove_weight_norm(module)


def by_torch(module: nn.Module) -> None:
    parametrize.remove_parametrizations(module, "weight")


def stacked(module: nn.Module) -> None:
    parametrize.register_parametrization(module, "weight", Doubled())


def hooked(module: nn.Module) -> None:
    module.parametrizations.weight[0].register_forward_hook(lambda m, args, w: w + 1)


def list_hooked(module: nn.Module) -> None:
    module.parametrizations.weight.register_forward_hook(lambda m, args, w: w + 1)


def replaced(module: nn.Module) -> None:
    module.parametrizations.weight[0] = Shifted(0)


class Ratio(nn.Module):
    """A parametrization of somebody else's, without ``dim``."""

    def forward(self, g: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return v / g


def replaced_by_another(module: nn.Module) -> None:
    module.parametrizations.weight[0] = Ratio()


SURGERY = [by_wnkernel, by_torch, stacked, hooked, list_hooked, replaced, replaced_by_another]


@both_modes
@pytest.mark.parametrize("moment", ["before", "after", "within"])
@pytest.mark.parametrize("surgery", SURGERY)
def test_surgery_on_a_member(computed: Computed, surgery, moment, reuse):
    model, twin = Net(), Net()  # no copies: those share a class, which torch's removal changes
    twin.load_state_dict(model.state_dict())
    group = wnkernel.fuse(model, reuse=reuse)
    surgery(layer(twin, "back.image"))
    if moment == "before":
        surgery(layer(model, "back.image"))
    if moment == "after":
        model()
        surgery(layer(model, "back.image"))
    if moment == "within":
        with group.scope():
            model()
            surgery(layer(model, "back.image"))
            assert_same(model(), twin())
    for _ in range(2):
        assert_same_training(model, twin)
    group.refresh()
    computed.take()
    model()
    launches, _ = computed.take()
    assert launches == [6]
    group.remove()
    assert_same_training(model, twin)


@both_modes
def test_cached(route, reuse):
    model, twin, group = twins(reuse)
    for context in (group.scope, parametrize.cached, group.scope):
        with parametrize.cached(), context():
            for _ in range(2):
                assert_same(model(), twin())
            assert layer(model, "head").weight is layer(model, "head").weight
        triple(model), triple(twin)
        assert_same_models(model, twin)


# The way back


@both_modes
def test_remove_gives_the_plain_layers_back(route, computed: Computed, reuse):
    model, twin, group = twins(reuse)
    model().sum().backward()
    model.zero_grad()
    for _ in range(2):
        group.remove()
        assert_plain(model)
        assert group.memory()["slots"] == 0
        assert_same_training(model, twin)
    computed.take()
    with group.scope():
        model()
    assert computed.take() == ([], 7)
    wnkernel.fuse(model, reuse=reuse)
    model()
    assert computed.take() == ([7], 0)
    assert_same_training(model, twin)


@both_modes
def test_remove_leaves_the_copies_alone(computed: Computed, reuse):
    model, twin, group = twins(reuse)
    model()
    copied = copy.deepcopy(model)
    group.remove()
    computed.take()
    copied()
    assert computed.take() == ([7], 0)
    assert_same_models(copied, twin)


def test_remove_leaves_the_hooks_of_others():
    model, _, group = twins()
    calls = []
    for module in (model, model.front):
        module.register_forward_pre_hook(lambda *_: calls.append("before"))
        module.register_forward_hook(lambda *_: calls.append("after"), always_call=True)
    group.remove()
    model()
    assert calls == ["before", "before", "after", "after"]
    assert len(model._forward_hooks_always_called) == 1


@both_modes
def test_remove_in_the_middle_of_a_forward(route, computed: Computed, reuse):
    model, twin, group = twins(reuse)
    model.front.register_forward_hook(lambda *_: group.remove())
    computed.take()
    y = model()
    assert computed.take() == ([7], 3)
    assert_same(y, twin())
    y.sum().backward()
    twin().sum().backward()
    assert_same_tensors(gradients(model), gradients(twin))
    assert_same_models(model, twin)
