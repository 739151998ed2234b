"""Hooks of others that change a state dict before a weight-normed layer loads it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm as torch_weight_norm

import wnkernel

from ..checkpoints import all_layouts, assert_loaded, g_and_v, ours, saved
from ..versions import load_pre_hook

PLACES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "layer": lambda m: m,
    "parametrizations": lambda m: m.parametrizations,
    "list": lambda m: m.parametrizations.weight,
}
all_places = pytest.mark.parametrize("place", PLACES)


def linear() -> nn.Module:
    return nn.Linear(5, 4)


def add_hook(module: nn.Module, change: Callable[[dict[str, Any], str], None]) -> None:
    """``change(state_dict, key)`` for each key below the module."""

    def hook(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in [key for key in state_dict if key.startswith(prefix)]:
            change(state_dict, key)

    load_pre_hook(module, hook)


def times_three(state_dict: dict[str, Tensor], key: str) -> None:
    if key.endswith(("original0", "weight_g", "weight")):
        state_dict[key] = 3 * state_dict[key]


def drop(state_dict: dict[str, Tensor], key: str) -> None:
    if "bias" not in key:
        del state_dict[key]


@all_places
def test_what_a_hook_changes_is_loaded(place):
    """As with torch's weight norm."""
    checkpoint = saved(linear(), "parametrized")
    layers = [ours(linear()), torch_weight_norm(linear())]
    for layer in layers:
        add_hook(PLACES[place](layer), times_three)
        layer.load_state_dict(dict(checkpoint))
    got, want = (layer.weight for layer in layers)
    torch.testing.assert_close(got, want)
    assert_loaded(layers[0], layers[1].state_dict(), "parametrized")


@all_layouts
def test_every_layout_may_be_changed(layout):
    plain = linear()
    checkpoint, layer = saved(plain, layout), ours(linear())
    want = ours(linear())
    want.load_state_dict(checkpoint)
    add_hook(layer, times_three)
    layer.load_state_dict(dict(checkpoint))
    torch.testing.assert_close(layer.weight, 3 * want.weight)


@all_places
def test_what_a_hook_takes_away_is_missing(place):
    checkpoint, layer = saved(linear(), "parametrized"), ours(linear())
    before = copy.deepcopy(layer.parametrizations.state_dict())
    add_hook(PLACES[place](layer), drop)
    result = layer.load_state_dict(dict(checkpoint), strict=False)
    assert set(result.missing_keys) == set(g_and_v())
    assert result.unexpected_keys == []
    for key, t in layer.parametrizations.state_dict().items():
        assert torch.equal(t, before[key])


@pytest.mark.parametrize("layout", ["legacy", "folded"])
def test_what_is_taken_away_in_another_layout_is_missing(layout):
    checkpoint, layer = saved(linear(), layout), ours(linear())
    before = layer.weight.clone()
    add_hook(layer, drop)
    assert set(layer.load_state_dict(dict(checkpoint), strict=False).missing_keys) == {*g_and_v()}
    assert torch.equal(layer.weight, before)


@all_layouts
def test_a_hook_may_give_the_keys_their_names(layout):
    checkpoint, layer = saved(linear(), layout), ours(linear())

    def rename(state_dict: dict[str, Any], key: str) -> None:
        state_dict[key.removeprefix("old_")] = state_dict.pop(key)

    add_hook(layer, rename)
    result = layer.load_state_dict({f"old_{key}": t for key, t in checkpoint.items()}, strict=False)
    assert result.missing_keys == []
    assert_loaded(layer, checkpoint, layout)


def test_a_hook_may_reshape():
    """g of an old release, say, that was a vector."""
    checkpoint, layer = saved(linear(), "parametrized"), ours(linear())
    g, _ = g_and_v()

    def reshape(state_dict: dict[str, Any], key: str) -> None:
        if key == g:
            state_dict[g] = state_dict[g][:, None]

    add_hook(layer, reshape)
    layer.load_state_dict(checkpoint | {g: checkpoint[g].flatten()})
    assert_loaded(layer, checkpoint, "parametrized")


@pytest.mark.parametrize("layout", ["legacy", "folded"])
def test_a_v_that_is_normed_itself_and_has_a_hook_of_others(layout):
    """The outer list has loaded both before the turn of the inner one, which must not do so again
    from keys that are not its own."""
    layer, checkpoint, calls = ours(linear()), saved(linear(), layout), []
    wnkernel.weight_norm(layer.parametrizations.weight, "original1")
    inner = layer.parametrizations.weight.parametrizations.original1
    load_pre_hook(inner, lambda *a: calls.append(a))
    for _ in range(2):
        assert layer.load_state_dict(dict(checkpoint), strict=True) == ([], [])
        torch.testing.assert_close(layer.weight, ours_with(checkpoint).weight)
    assert len(calls) == 2


def ours_with(checkpoint):
    layer = ours(linear())
    layer.load_state_dict(checkpoint)
    return layer


@all_layouts
def test_hooks_of_others_are_called_once(layout):
    """Also those of the list, which calls them itself; and nothing of the dict is kept."""
    layer, calls = ours(linear()), []
    for place, module in PLACES.items():
        load_pre_hook(module(layer), lambda *a, p=place: calls.append(p))
    for _ in range(2):
        layer.load_state_dict(saved(linear(), layout))
    assert calls == 2 * ["layer", "parametrizations", "list"]
    weights = layer.parametrizations.weight
    assert "_visit" not in vars(weights)
    assert len(weights._load_state_dict_pre_hooks) == 1


def test_a_fused_model_with_a_hook():
    model = nn.Sequential(wnkernel.weight_norm(linear()), nn.Tanh())
    wnkernel.fuse(model)
    add_hook(model, times_three)
    checkpoint = saved(linear(), "legacy")
    plain = ours(linear())
    plain.load_state_dict(checkpoint)
    model.load_state_dict({f"0.{key}": t for key, t in checkpoint.items()})
    torch.testing.assert_close(model[0].weight, 3 * plain.weight)
