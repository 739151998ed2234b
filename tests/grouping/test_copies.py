"""Copies, checkpoints and replicas of a fused model: each is right, and none reaches another."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import wnkernel

from ..groups import (
    Computed,
    Net,
    assert_plain,
    assert_same,
    assert_same_models,
    assert_same_tensors,
    both_modes,
    gradients,
    triple,
    twins,
    weights,
)
from ..layers import assert_same_state


@pytest.fixture(params=["before", "after", "scope"])
def moment(request: pytest.FixtureRequest) -> Callable[..., AbstractContextManager[None]]:
    """When a copy is made: before the first forward, after one, in a scope with live weights."""

    def context(model: nn.Module, group: wnkernel.WeightNormGroup) -> AbstractContextManager[None]:
        if request.param != "before":
            model().sum().backward()
            model.zero_grad()
        return group.scope() if request.param == "scope" else nullcontext()

    return context


# deepcopy


@both_modes
def test_a_copy_has_a_group_of_its_own(route, computed: Computed, moment, reuse):
    model, twin, group = twins(reuse)
    with moment(model, group):
        if reuse == "forward":
            weights(model)
        copied = copy.deepcopy(model)
        copied_twin = copy.deepcopy(twin)
        assert_same_models(copied, copied_twin)
    for one, other in ((model, twin), (copied, copied_twin)):
        triple(one), triple(other)
        for module in (model, twin, copied, copied_twin):
            module.zero_grad()
        assert_same_models(model, twin)
        assert_same_models(copied, copied_twin)
        for module in (one, other):
            module().square().sum().backward()
        assert_same_tensors(gradients(one), gradients(other))
        assert all(p.grad is None for p in (copied if one is model else model).parameters())
    computed.take()
    triple(copied)
    copied()
    assert computed.take() == ([7], 0)
    assert not torch.equal(model.head.weight, copied.head.weight)


@both_modes
def test_a_copy_holds_nothing_in_the_original_group(route, reuse):
    model, _, group = twins(reuse)
    copied = copy.deepcopy(model)
    copied()
    assert group.memory()["slots"] == 0
    with group.scope():
        computed_alone = copied.head.weight
        assert group.memory()["slots"] == 0
    assert_same(computed_alone, model.head.weight)


@both_modes
def test_a_copied_handle_is_that_of_the_copied_model(computed: Computed, reuse):
    model, _, group = twins(reuse)
    model()
    for copied, handle in (
        copy.deepcopy((model, group)),
        copy.deepcopy((group, model))[::-1],
    ):
        assert handle.layers == group.layers
        computed.take()
        with handle.scope():
            weights(copied)
        assert computed.take() == ([7], 0)
        handle.remove()
        assert_plain(copied)
        assert len(group.layers) == 7
        model()
        assert computed.take()[1] == 0


@pytest.mark.parametrize("model_is", ["alive", "gone"])
def test_a_handle_copied_alone_is_one_of_no_model(model_is):
    model = Net()
    group = wnkernel.fuse(model)
    layers = group.layers
    if model_is == "gone":
        del model
        gc.collect()
        layers = []
    handle = copy.deepcopy(group)
    assert handle.layers == []
    with handle.scope():
        handle.refresh()
    handle.remove()
    assert handle.memory()["slots"] == 0
    assert group.layers == layers


@both_modes
def test_a_copied_part_is_computed_alone(route, computed: Computed, moment, reuse):
    model, twin, group = twins(reuse)
    with moment(model, group):
        part, part_twin = copy.deepcopy(model.front), copy.deepcopy(twin.front)
    computed.take()
    assert_same_models(part, part_twin)
    assert computed.take()[0] == []
    triple(model)
    assert_same_models(part, part_twin)
    triple(part), triple(part_twin)
    assert_same_models(part, part_twin)


@both_modes
def test_the_forward_of_a_copied_part_is_no_scope_of_the_original(computed: Computed, reuse):
    model, _, group = twins(reuse)
    part = copy.deepcopy(model.front)
    part.conv.register_forward_hook(lambda *_: weights(model) and None)
    computed.take()
    part()
    assert computed.take() == ([], 7 + 3)
    assert group.memory()["slots"] == 0


@both_modes
def test_a_copied_part_can_be_fused(computed: Computed, reuse):
    model, twin, _ = twins(reuse)
    model()
    part, part_twin = copy.deepcopy(model.front), copy.deepcopy(twin.front)
    group = wnkernel.fuse(part)
    assert len(part._forward_pre_hooks) == len(part._forward_hooks) == 1
    computed.take()
    part()
    assert computed.take() == ([3], 0)
    assert_same_models(part, part_twin)
    group.remove()
    assert_plain(part)
    triple(twin), triple(model)
    assert_same_models(model, twin)


@both_modes
def test_a_copied_layer_is_plain(route, reuse):
    model, _, _ = twins(reuse)
    model()
    layer = copy.deepcopy(model.head)
    assert_plain(layer)
    assert_same(layer.weight, model.head.weight)


@both_modes
def test_a_copied_parent_has_a_group_in_it(computed: Computed, reuse):
    model, twin, _ = twins(reuse)
    parent = nn.ModuleDict({"first": model, "same": model, "other": nn.Linear(3, 3)})
    model()
    copied = copy.deepcopy(parent)
    assert copied["first"] is copied["same"]
    computed.take()
    copied["first"]()
    assert computed.take() == ([7], 0)
    triple(model)
    assert_same_models(copied["first"], twin)


@both_modes
def test_a_copy_of_a_copy(computed: Computed, reuse):
    model, twin, _ = twins(reuse)
    for _ in range(3):
        model = copy.deepcopy(model)
        assert_same_models(model, twin)
        triple(model), triple(twin)
    computed.take()
    model()
    assert computed.take() == ([7], 0)


@both_modes
def test_options_are_copied(computed: Computed, reuse):
    model, _, _ = twins(reuse, bucket_cap_mb=1e-9)
    copied = copy.deepcopy(model)
    computed.take()
    copied(), copied()
    assert computed.take() == ([1] * (7 if reuse == "version" else 14), 0)


# Averages


@both_modes
def test_averaged_models(route, computed: Computed, reuse):
    model, twin, _ = twins(reuse)
    averages = [
        AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.5)) for module in (model, twin)
    ]
    for step in range(3):
        for module, average in zip((model, twin), averages, strict=True):
            with torch.no_grad():
                for p in module.parameters():
                    p.add_(0.1 * (step + 1))
            average.update_parameters(module)
        with torch.no_grad():
            computed.take()
            y = averages[0]()
            assert computed.take() == ([7], 0)
            assert_same(y, averages[1]())
        assert_same_models(model, twin)
    assert_same_models(averages[0].module, averages[1].module)


# Checkpoints


@both_modes
def test_state_dicts_are_those_of_the_plain_model(moment, reuse):
    model, twin, group = twins(reuse)
    with moment(model, group):
        assert_same_state(model.state_dict(), twin.state_dict())
        assert model.state_dict()._metadata == twin.state_dict()._metadata
        names = [name for name, _ in twin.named_modules()]
        assert [name for name, _ in model.named_modules()] == names
    assert [k for k, _ in model.named_buffers()] == [k for k, _ in twin.named_buffers()]


@both_modes
def test_saved_and_loaded(moment, reuse):
    model, _, group = twins(reuse)
    triple(model)
    with moment(model, group):
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
    for load in (lambda new: new, lambda new: wnkernel.fuse(new, reuse=reuse) and new):
        file.seek(0)
        new = load(Net())
        new()
        new.load_state_dict(torch.load(file))
        assert_same_models(model, new)


# Replicas


def replicate(model: nn.Module) -> nn.Module:
    """What ``torch.nn.parallel.replicate`` makes for one device: modules whose parameters are
    attributes, and no leaves."""
    modules = list(model.modules())
    replicas = {id(module): module._replicate_for_data_parallel() for module in modules}
    for module in modules:
        replica = replicas[id(module)]
        for name, child in module._modules.items():
            setattr(replica, name, replicas[id(child)])
        for name, p in module._parameters.items():
            setattr(replica, name, p * 1)
    return replicas[id(model)]


@both_modes
def test_data_parallel_replicas_are_computed_alone(route, computed: Computed, reuse):
    model, twin, group = twins(reuse)
    model()
    slots = group.memory()["slots"]
    replicas = [replicate(model) for _ in range(2)]
    triple(model), triple(twin)  # what the replicas have is of before
    computed.take()
    outputs = [replica() for replica in replicas]
    with group.scope():
        outputs.append(replicas[0]())
    assert computed.take() == ([], 21)
    assert group.memory()["slots"] == slots
    assert_same_models(model, twin)
    for y in outputs:
        assert_same(y, outputs[0])


@both_modes
def test_gradients_of_replicas_reach_the_model(route, reuse):
    model, twin, _ = twins(reuse)
    for module in (model, twin):
        module().sum().backward()
        replicate(module)().sum().backward()
    assert_same_tensors(gradients(model), gradients(twin))


def test_a_shallow_copy_shares_the_group(computed: Computed):
    model, twin, _ = twins()
    shallow = copy.copy(model)
    assert shallow.head is model.head
    want = twin()
    computed.take()
    assert_same(shallow(), want)
    assert computed.take() == ([7], 0)
    triple(shallow), triple(twin)
    assert_same_models(model, twin)


# The handle of a copy


def test_the_group_of_a_copy_can_be_had_and_removed():
    model, _, group = twins()
    copied = copy.deepcopy(model)
    found = wnkernel.WeightNormGroup.of(copied)
    assert found.layers == group.layers
    with found.scope():
        assert copied.head.weight.grad_fn is copied.front.conv.weight.grad_fn
    found.remove()
    assert_plain(copied)
    assert wnkernel.WeightNormGroup.of(model).layers == group.layers


@pytest.mark.parametrize("part", ["front", "head"])
def test_a_part_has_no_group_of_its_own(part):
    model, _, _ = twins()
    with pytest.raises(ValueError, match=r"^model: expected one that fuse"):
        wnkernel.WeightNormGroup.of(getattr(model, part))
