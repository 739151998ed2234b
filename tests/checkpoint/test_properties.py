"""Any tree of modules, any of its weights normed, in any layout: loaded, saved, converted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import wnkernel
from wnkernel import convert_state_dict

from ..checkpoints import KINDS, LAYOUTS, assert_loaded, loaded, unchanged
from ..layers import APPLY

LEAVES = {
    "linear": (lambda: nn.Linear(3, 2), ("weight",)),
    "conv": (lambda: nn.Conv1d(1, 2, 1), ("weight",)),
    "to one channel": (lambda: nn.Conv2d(2, 1, (2, 1)), ("weight",)),
    "lstm": (lambda: nn.LSTM(2, 1), ("weight_ih_l0", "weight_hh_l0")),
    "norm": (lambda: nn.LayerNorm(2), ()),
}
NAMES = ["a", "weight", "weight_g", "parametrizations_", "0"]


@dataclass
class Leaf:
    kind: str
    dim: int | None
    layout: str | None
    """None: the layer is not normed."""


leaves = st.builds(
    Leaf,
    st.sampled_from(list(LEAVES)),
    st.sampled_from([0, 1, None]),
    st.sampled_from([*LAYOUTS, None]),
)
trees = st.recursive(
    leaves, lambda below: st.dictionaries(st.sampled_from(NAMES), below, max_size=3), max_leaves=6
)


def build(tree, apply):
    """A model; ``apply`` norms a parameter of a leaf."""
    if isinstance(tree, dict):
        model = nn.Module()
        for name, below in tree.items():
            model.add_module(name, build(below, apply))
        return model
    make, names = LEAVES[tree.kind]
    layer = make()
    for name in names:
        if tree.layout is not None:
            apply(layer, name, tree)
    return layer


def as_saved(layer, name, leaf):
    APPLY[KINDS[leaf.layout]](layer, name, leaf.dim)
    with torch.no_grad():
        loaded(layer, name)[0].mul_(1.5)
    if leaf.layout == "folded":
        nn.utils.remove_weight_norm(layer, name)


def as_ours(layer, name, leaf):
    wnkernel.weight_norm(layer, name, leaf.dim)


def as_legacy(layer, name, leaf):
    APPLY["legacy"](layer, name, leaf.dim)


def as_torchs(layer, name, leaf):
    APPLY["torch"](layer, name, leaf.dim)


def each(tree, prefix=""):
    if isinstance(tree, dict):
        for name, below in tree.items():
            yield from each(below, f"{prefix}{name}.")
    elif tree.layout is not None:
        for name in LEAVES[tree.kind][1]:
            yield prefix, name, tree


def below(prefix, state):
    return {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


@settings(max_examples=150)
@given(trees, st.booleans(), st.sampled_from([as_ours, as_legacy, as_torchs]))
def test_any_mixture_loads_into_any_model(tree, assign, apply):
    checkpoint = build(tree, as_saved).state_dict()
    model = build(tree, apply)
    wnkernel.accept_any_layout(model)
    with unchanged(checkpoint):
        assert model.load_state_dict(checkpoint, strict=True, assign=assign) == ([], [])
    for prefix, name, leaf in each(tree):
        layer = model.get_submodule(prefix.removesuffix("."))
        assert_loaded(layer, below(prefix, checkpoint), leaf.layout, name, leaf.dim)


@settings(max_examples=150)
@given(trees)
def test_conversions_are_what_the_models_save(tree):
    checkpoint, legacy = build(tree, as_torchs).state_dict(), build(tree, as_legacy)
    with unchanged(checkpoint):
        converted = convert_state_dict(checkpoint, "legacy")
    legacy.load_state_dict(converted, strict=True)
    assert_same(convert_state_dict(legacy.state_dict(), "parametrized"), checkpoint)
    back = convert_state_dict(converted, "parametrized")
    assert list(back) == list(checkpoint)
    assert all(back[key] is t for key, t in checkpoint.items())


@settings(max_examples=150)
@given(trees)
def test_folded_models_compute_with_the_same_weights(tree):
    model, plain = build(tree, as_ours), build(tree, lambda *_: None)
    folded = convert_state_dict(model.state_dict(), "folded")
    plain.load_state_dict(folded, strict=True)
    for prefix, name, _ in each(tree):
        path = prefix.removesuffix(".")
        w = getattr(model.get_submodule(path), name)
        assert torch.equal(getattr(plain.get_submodule(path), name), w)
    split = convert_state_dict(folded, like=model)
    build(tree, as_torchs).load_state_dict(split, strict=True)
