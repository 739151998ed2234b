"""Fused models in pickles: they come back with their group."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import wnkernel
from wnkernel import WeightNormGroup
from wnkernel.grouping import scopes

from ..changes import in_place
from ..groups import (
    LAYERS,
    Block,
    Computed,
    Net,
    assert_plain,
    assert_same,
    assert_same_models,
    both_modes,
    originals,
    ramp,
    triple,
    twins,
)
from ..pickles import all_ways, by_protocol, by_torch_save

there_and_back = by_protocol(4)


@all_ways
@both_modes
def test_there_and_back(way: Callable, reuse: str, computed: Computed) -> None:
    model, twin, group = twins(reuse)
    assert_same_models(model, twin)
    got = way(model)
    assert WeightNormGroup.of(got).layers == group.layers == [f"{name}.weight" for name in LAYERS]
    assert repr(WeightNormGroup.of(got)) == repr(group)
    for module in (copy.deepcopy(got), got, model):
        computed.take(), module()
        assert computed.take() == ([] if (reuse, module) == ("version", model) else [7], 0)
        module()
        assert computed.take() == ([7] if reuse == "forward" else [], 0)
        module.front()
        assert computed.take() == ([3] if reuse == "forward" else [], 0)
        triple(module), module()
        assert computed.take() == ([7], 0)
    triple(twin)
    assert_same_models(got, twin)
    got().sum().backward()
    assert all(p.grad is not None for p in originals(got))
    assert all(p.grad is None for p in originals(model))


@both_modes
def test_a_step_of_an_optimizer_counts(reuse: str) -> None:
    model, twin, _ = twins(reuse)
    got = there_and_back(model)
    for module in (got, twin):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, fused=True)
        for _ in range(2):
            module.zero_grad(), module().square().mean().backward(), optimizer.step()
    assert_same_models(got, twin)


def test_buckets(computed: Computed) -> None:
    model, _, _ = twins(bucket_cap_mb=1e-6)
    model()
    counted = computed.take()
    assert counted == ([1] * 7, 0)
    got = there_and_back(model)
    got()
    assert computed.take() == counted


@pytest.mark.parametrize("autocast", [False, True])
def test_autocast(autocast: bool) -> None:
    build = lambda: Block(one=(wnkernel.weight_norm(nn.Linear(5, 4)), (2, 5)))  # noqa: E731
    model, _, _ = twins(build=build, autocast=autocast)
    got = by_torch_save()(model)
    with torch.autocast("cpu", torch.bfloat16), WeightNormGroup.of(got).scope():
        assert got.one.weight.dtype == (torch.bfloat16 if autocast else torch.float32)


def test_a_part_comes_back_without_a_group(computed: Computed) -> None:
    model, twin, _ = twins("version")
    for part, of_twin in ((model.front, twin.front), (model.head, twin.head)):
        got = there_and_back(part)
        assert scopes.container_of(got) is None
        assert all(owner is None for m in got.modules() if (owner := getattr(m, "owner", None)))
        x = () if part is model.front else (ramp(2, 9),)
        assert_same(got(*x), of_twin(*x))
        wnkernel.fuse(got)
        computed.take(), got(*x)
        assert computed.take()[1] == 0
    assert_same_models(model, twin)


WHOLES: dict[str, Callable[[nn.Module, WeightNormGroup], list[object]]] = {
    "model": lambda model, group: [model],
    "handle first": lambda model, group: [group, model],
    "another handle": lambda model, group: [WeightNormGroup.of(model), model],
    "model in a model": lambda model, group: [nn.ModuleList([nn.Linear(2, 2), model, model])],
}


@pytest.mark.parametrize("whole", WHOLES.values(), ids=WHOLES)
@pytest.mark.parametrize("early", [False, True])
def test_models_that_keep_their_handle(early: bool, whole: Callable, computed: Computed) -> None:
    model = Net()
    twin = copy.deepcopy(model)
    if early:
        model.group = None  # comes before what the group itself puts there
    model.group = wnkernel.fuse(model)
    for way in (there_and_back, copy.deepcopy):
        *others, got = way(whole(model, model.group))
        got = got[1] if isinstance(got, nn.ModuleList) else got
        assert got.group is not model.group
        assert got.group.layers == model.group.layers == WeightNormGroup.of(got).layers
        assert all(other.layers == got.group.layers for other in others)
        assert_same_models(got, twin)
        computed.take()
        with got.group.scope():
            got(), got()
        assert computed.take() == ([7], 0)
        got.group.remove()
        assert_same_models(got, twin)
        assert_plain(got)
    assert_same_models(model, twin)
    assert len(model.group.layers) == 7


def test_a_handle_of_a_group_that_is_no_more() -> None:
    model, twin, group = twins()
    model.group = group
    group.remove()
    for got in (there_and_back(model), copy.deepcopy(model)):
        assert got.group.layers == []
        assert repr(got.group) == repr(group)
        got.group.remove()
        with got.group.scope():
            assert_same_models(got, twin)
        assert_plain(got)
    del model
    assert there_and_back(group).layers == []


def test_members_that_left() -> None:
    model, twin, _ = twins("version")
    for module in (model, twin):
        wnkernel.remove_weight_norm(module.head)
        nn.utils.remove_weight_norm(module.front.up)
    model()
    got = there_and_back(model)
    assert len(WeightNormGroup.of(got).layers) == 5
    assert_same_models(got, twin)
    in_place(originals(got)[0]), in_place(originals(twin)[0])
    assert_same_models(got, twin)


@both_modes
def test_in_the_middle_of_a_scope(reuse: str) -> None:
    model, twin, group = twins(reuse)
    with group.scope():
        model()
        got = there_and_back(model)
        size = len(pickle.dumps(model))
        assert_same_models(got, twin)
    assert_same_models(got, twin)
    assert abs(size - len(pickle.dumps(model))) < 200  # no weight comes along


def test_a_part_that_knows_the_whole() -> None:
    model, twin, _ = twins()
    vars(model.front)["whole"] = model
    got = there_and_back(model.front)
    assert_same(got(), twin.front())
    assert_same_models(got.whole, twin)
    assert got.whole.front is got


def test_folded_after_it_came_back() -> None:
    model, twin, _ = twins("version")
    got = there_and_back(model)
    got(), wnkernel.fold(got)
    assert_same(got(), twin())
    assert_plain(got)
    assert type(got) is Net
