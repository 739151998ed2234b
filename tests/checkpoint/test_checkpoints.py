"""Loading: our dicts in torch's layers, the other way, and legacy ``weight_g`` / ``weight_v``."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

import wnkernel

from ..layers import (
    LAYERS,
    all_dims,
    all_layers,
    assert_same_state,
    legacy_weight_norm,
    originals,
    run,
    twins,
)


@all_dims
@all_layers
@pytest.mark.parametrize("kinds", [("ours", "torch"), ("torch", "ours")], ids=" to ".join)
def test_both_ways(kinds, layer, dim):
    (source,), (target,) = twins(layer, dim, kinds[0]), twins(layer, dim, kinds[1])
    assert not torch.equal(run(target, layer), run(source, layer))
    target.load_state_dict(source.state_dict())
    assert_same_state(target.state_dict(), source.state_dict())
    torch.testing.assert_close(run(target, layer), run(source, layer))


@all_dims
@all_layers
def test_legacy_keys(layer, dim):
    (source,), (target,) = twins(layer, dim, "legacy"), twins(layer, dim, "ours")
    name = LAYERS[layer][1]
    checkpoint = source.state_dict()
    keys = list(checkpoint)
    assert f"{name}_g" in keys
    target.load_state_dict(checkpoint, strict=True)
    assert list(checkpoint) == keys  # the caller's dict is not ours to rename
    g, v = originals(target, name)
    assert torch.equal(g, checkpoint[f"{name}_g"])
    assert torch.equal(v, checkpoint[f"{name}_v"])
    torch.testing.assert_close(run(target, layer), run(source, layer))


def nested(apply):
    return nn.ModuleDict(
        {
            "encoder": nn.Sequential(apply(nn.Conv1d(2, 3, 3)), nn.Sequential(nn.Linear(3, 3))),
            "head": apply(nn.Linear(4, 5)),
        }
    )


def test_legacy_keys_below_prefixes():
    source, target = nested(legacy_weight_norm), nested(wnkernel.weight_norm)
    target.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(originals(target["head"])[1], source["head"].weight_v)
    assert torch.equal(originals(target["encoder"][0])[0], source["encoder"][0].weight_g)


def test_legacy_keys_of_two_parameters():
    source, target = nn.LSTM(4, 5), nn.LSTM(4, 5)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        legacy_weight_norm(source, name)
        wnkernel.weight_norm(target, name)
    target.load_state_dict(source.state_dict(), strict=True)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        assert torch.equal(originals(target, name)[1], getattr(source, f"{name}_v"))


def test_legacy_keys_reach_a_deepcopy():
    source = legacy_weight_norm(nn.Linear(5, 4))
    first = wnkernel.weight_norm(nn.Linear(5, 4))
    twin = copy.deepcopy(first)
    before = first.weight.clone()
    twin.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(originals(twin)[1], source.weight_v)
    assert torch.equal(first.weight, before)


def test_assign():
    source, target = (wnkernel.weight_norm(nn.Linear(5, 4)) for _ in range(2))
    target.load_state_dict(source.state_dict(), assign=True)
    assert originals(target)[1].data_ptr() == originals(source)[1].data_ptr()
    assert torch.equal(run(target, "Linear"), run(source, "Linear"))


def removed():
    layer = wnkernel.weight_norm(nn.Linear(5, 4))
    wnkernel.remove_weight_norm(layer)
    return layer


def removed_by_torch():
    layer = wnkernel.weight_norm(nn.Linear(5, 4))
    parametrize.remove_parametrizations(layer, "weight")
    return layer


@pytest.mark.parametrize("target", [removed, removed_by_torch])
def test_plain_again(target):
    """A layer whose weight norm was removed loads what a plain layer does, and nothing else."""
    target = target()
    plain = nn.Linear(5, 4)
    target.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(target.weight, plain.weight)
    legacy = legacy_weight_norm(nn.Linear(5, 4)).state_dict()
    parametrized = wnkernel.weight_norm(nn.Linear(5, 4)).state_dict()
    for checkpoint in (legacy, parametrized):
        assert target.load_state_dict(checkpoint, strict=False) == plain.load_state_dict(
            checkpoint, strict=False
        )


@pytest.mark.parametrize("target", [removed, removed_by_torch])
@pytest.mark.parametrize("checkpoint", [wnkernel.weight_norm, legacy_weight_norm])
def test_weight_normed_again(target, checkpoint):
    target, source = wnkernel.weight_norm(target()), checkpoint(nn.Linear(5, 4))
    target.load_state_dict(source.state_dict(), strict=True)
    torch.testing.assert_close(run(target, "Linear"), run(source, "Linear"))
    assert len(target._load_state_dict_pre_hooks) == 1


@pytest.mark.parametrize("target", [removed, removed_by_torch])
def test_legacy_layer_again(target):
    """The layer that torch's own stale hook breaks."""
    target, source = legacy_weight_norm(target()), legacy_weight_norm(nn.Linear(5, 4))
    target.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(target.weight_v, source.weight_v)


@pytest.mark.parametrize("layout", [wnkernel.weight_norm, legacy_weight_norm])
def test_a_layer_with_another_parametrization_instead(layout):
    target, plain = spectral_norm(removed_by_torch()), spectral_norm(nn.Linear(5, 4))
    checkpoint = layout(nn.Linear(5, 4)).state_dict()
    assert target.load_state_dict(checkpoint, strict=False) == plain.load_state_dict(
        checkpoint, strict=False
    )
