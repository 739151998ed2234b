"""``accept_any_layout`` on modules with code of their own: hooks that compute another weight, and
other ways of loading."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.weight_norm import WeightNorm as LegacyHook

import wnkernel

from ..checkpoints import all_layouts, assert_loaded, load_error, nothing_loaded, saved
from ..layers import legacy_weight_norm


class DoubledHook(LegacyHook):
    def compute_weight(self, module):
        return 2 * super().compute_weight(module)


def linear():
    return nn.Linear(5, 4)


def doubled():
    layer = legacy_weight_norm(linear())
    next(iter(layer._forward_pre_hooks.values())).__class__ = DoubledHook
    wnkernel.accept_any_layout(layer)
    return layer


@pytest.mark.parametrize("layout", ["parametrized", "legacy"])
def test_a_subclass_of_the_hook_takes_pairs(layout):
    layer, checkpoint = doubled(), saved(linear(), layout)
    layer.load_state_dict(checkpoint, strict=True)
    assert_loaded(layer, checkpoint, layout)


def test_a_subclass_of_the_hook_takes_no_plain_weight():
    """What it would compute from that may be any other."""
    layer, checkpoint = doubled(), saved(linear(), "folded")
    with nothing_loaded(nn.ParameterList([layer.weight_g, layer.weight_v])):
        error = load_error(lambda: layer.load_state_dict(checkpoint))
    assert 'weight: expected g and v, got the plain weight "weight"' in error
    assert "DoubledHook may compute another weight" in error


def test_a_subclass_of_the_hook_takes_no_plain_weight_beside_a_pair():
    layer, checkpoint = doubled(), saved(linear(), "legacy")
    checkpoint["weight"] = torch._weight_norm(checkpoint["weight_v"], checkpoint["weight_g"], 0)
    assert 'got "weight", which is not that of' in load_error(
        lambda: layer.load_state_dict(checkpoint)
    )


@all_layouts
def test_a_way_of_loading_that_a_module_has_of_its_own(layout):
    with torch.no_grad():
        layer = legacy_weight_norm(linear())
    seen = []

    def load(state_dict, prefix, *rest):
        seen.append(prefix)
        nn.Linear._load_from_state_dict(layer, state_dict, prefix, *rest)

    layer._load_from_state_dict = load
    model = nn.Sequential(layer)
    handle = wnkernel.accept_any_layout(model)
    checkpoint = saved(linear(), layout)
    model.load_state_dict({f"0.{key}": t for key, t in checkpoint.items()}, strict=True)
    assert seen == ["0."]
    assert_loaded(layer, checkpoint, layout)
    handle.remove()
    assert layer._load_from_state_dict is load
    assert vars(layer).keys() == vars(legacy_weight_norm(linear())).keys() | {
        "_load_from_state_dict"
    }


@all_layouts
def test_copies_have_it_too(layout):
    with torch.no_grad():
        layer = legacy_weight_norm(linear())
    layer._load_from_state_dict = layer._load_from_state_dict  # bound to this layer
    wnkernel.accept_any_layout(layer)
    twin, checkpoint = copy.deepcopy(layer), saved(linear(), layout)
    with nothing_loaded(layer):
        twin.load_state_dict(checkpoint, strict=True)
    assert_loaded(twin, checkpoint, layout)
    wnkernel.convert(twin)
    assert twin._load_from_state_dict.__self__ is twin
