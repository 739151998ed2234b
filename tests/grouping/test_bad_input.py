"""Bad input to ``fuse`` and to fused models: clear errors, and nothing half-done behind them."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import wnkernel
from wnkernel.grouping import group as grouping
from wnkernel.grouping import scopes
from wnkernel.grouping.members import Member

from ..groups import (
    LAYERS,
    Computed,
    Net,
    assert_plain,
    assert_same,
    assert_same_models,
    both_modes,
    twins,
    weights,
)
from ..layers import APPLY
from ..messages import here, message
from ..models.test_layer import Doubled, Shifted

# id -> (options, error, argument named, expected, got)
OPTIONS = {
    "reuse unknown": ({"reuse": "forever"}, ValueError, "reuse", "forward, version", "'forever'"),
    "reuse None": ({"reuse": None}, ValueError, "reuse", "forward, version", "None"),
    "reuse unhashable": ({"reuse": []}, ValueError, "reuse", "forward, version", r"\[\]"),
    "cap zero": ({"bucket_cap_mb": 0}, ValueError, "bucket_cap_mb", "> 0", "0"),
    "cap zero float": ({"bucket_cap_mb": 0.0}, ValueError, "bucket_cap_mb", "> 0", "0.0"),
    "cap negative": ({"bucket_cap_mb": -25}, ValueError, "bucket_cap_mb", "> 0", "-25"),
    "cap NaN": ({"bucket_cap_mb": math.nan}, ValueError, "bucket_cap_mb", "finite", "nan"),
    "cap infinite": ({"bucket_cap_mb": math.inf}, ValueError, "bucket_cap_mb", "finite", "inf"),
    "cap bool": ({"bucket_cap_mb": True}, TypeError, "bucket_cap_mb", "number or None", "bool"),
    "cap string": ({"bucket_cap_mb": "25"}, TypeError, "bucket_cap_mb", "number or None", "str"),
    "cap list": ({"bucket_cap_mb": [25]}, TypeError, "bucket_cap_mb", "number or None", "list"),
    "cap tensor": (
        {"bucket_cap_mb": torch.tensor(25)},
        TypeError,
        "bucket_cap_mb",
        "number or None",
        "Tensor",
    ),
    "autocast int": ({"autocast": 1}, TypeError, "autocast", "bool", "int"),
    "autocast None": ({"autocast": None}, TypeError, "autocast", "bool", "NoneType"),
    "autocast dtype": ({"autocast": torch.bfloat16}, TypeError, "autocast", "bool", "dtype"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(case):
    options, error, *pattern = OPTIONS[case]
    model = Net()
    with pytest.raises(error, match=message(*pattern)):
        wnkernel.fuse(model, **options)
    assert_plain(model)
    wnkernel.fuse(model)


def test_options_have_names():
    with pytest.raises(TypeError, match="positional argument"):
        wnkernel.fuse(Net(), "version")


@pytest.mark.parametrize(
    "model",
    [None, [Net()], nn.Linear, "model", lambda: None],
    ids=["None", "list", "class", "str", "function"],
)
def test_a_model_that_is_none(model):
    with pytest.raises(TypeError, match=message("model", "torch.nn.Module", type(model).__name__)):
        wnkernel.fuse(model)


# Models without a weight to group


def by_hand() -> nn.Module:
    layer = nn.Linear(3, 3)
    parametrize.register_parametrization(layer, "weight", Shifted(0), unsafe=True)
    return layer


def stacked() -> nn.Module:
    layer = wnkernel.weight_norm(nn.Linear(3, 3))
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


WITHOUT = {
    "no layers": (nn.Sequential, "none"),
    "plain layers": (lambda: nn.Linear(3, 3), "none"),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), "none"),
    "removed": (lambda: wnkernel.remove_weight_norm(wnkernel.weight_norm(nn.Linear(3, 3))), "none"),
    "torch": (
        lambda: APPLY["torch"](nn.Linear(3, 3)),
        r"torch\.nn\.utils\.parametrizations\.weight_norm only",
    ),
    "legacy": (lambda: APPLY["legacy"](nn.Linear(3, 3)), r"torch\.nn\.utils\.weight_norm only"),
    "stacked": (stacked, "parametrization"),  # not: expected wnkernel's, got wnkernel's
    "by hand": (by_hand, "parametrization"),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("case", WITHOUT)
def test_a_model_without_our_weight_norm(case, nested):
    build, got = WITHOUT[case]
    model = nn.Sequential(build(), nn.Tanh()) if nested else build()
    before = [len(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(ValueError, match=message("model", r"wnkernel\.weight_norm", got)):
        wnkernel.fuse(model)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == before


def test_other_kinds_beside_ours_are_left_out(computed: Computed):
    model = nn.Sequential(
        *(APPLY[kind](nn.Linear(3, 3)) for kind in ("ours", "torch", "legacy", "ours")), stacked()
    )
    group = wnkernel.fuse(model)
    assert group.layers == ["0.weight", "3.weight"]
    model(torch.ones(2, 3)).sum().backward()
    assert computed.take()[0] == [2]
    assert all(p.grad is not None for p in model.parameters())


# Groups that overlap


@both_modes
@pytest.mark.parametrize("again", [lambda m: m, lambda m: m.front, lambda m: m.head], ids="abc")
def test_fusing_twice(computed: Computed, again, reuse):
    model, twin, group = twins(reuse)
    for target in (again(model), nn.Sequential(nn.Linear(2, 2), again(model))):
        with pytest.raises(
            RuntimeError, match=message("model", "outside any group", "weight', which is in one")
        ):
            wnkernel.fuse(target)
    computed.take()
    model()
    assert computed.take() == ([7], 0)
    assert_same_models(model, twin)
    group.remove()
    assert_plain(model)
    wnkernel.fuse(again(model))


def test_a_part_that_is_fused_already():
    model = Net()
    part = wnkernel.fuse(model.back)
    with pytest.raises(RuntimeError, match=message("model", "outside any group", "'back.image")):
        wnkernel.fuse(model)
    assert not isinstance(model.head.parametrizations.weight.owner, Member)
    part.remove()
    assert len(wnkernel.fuse(model).layers) == len(LAYERS)


# Failures in the middle


def failing(after: int, error: BaseException, original: Callable) -> Callable:
    calls = []

    def call(*args: object, **kwargs: object) -> object:
        calls.append(None)
        if len(calls) > after:
            raise error
        return original(*args, **kwargs)

    return call


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt("boom")], ids=repr)
@pytest.mark.parametrize(
    ("where", "name", "after"),
    [
        (grouping, "Member", 0),
        (grouping, "Member", 4),
        (grouping, "Container", 1),
        (scopes, "attach", 1),
    ],
)
def test_a_fuse_that_fails_in_the_middle_leaves_nothing(monkeypatch, where, name, after, error):
    model = Net()
    twin_state = {k: v.clone() for k, v in model.state_dict().items()}
    with monkeypatch.context() as patch:
        patch.setattr(where, name, failing(after, error, getattr(where, name)))
        with pytest.raises(type(error), match="boom"):
            wnkernel.fuse(model)
    assert_plain(model)
    assert list(model.state_dict()) == list(twin_state)
    assert len(wnkernel.fuse(model).layers) == len(LAYERS)


# Members that something is wrong with


BAD_MEMBERS = {
    "g on meta": message("g", f"device {here()}", "meta"),
    "v on meta": message("g", "device meta", str(here())),
    "shape of g": message("g", r"shape \[6, 1, 1, 1\]", r"\[5, 1, 1, 1\]"),
    "complex g": message("g", "float", "[Cc]omplex"),
    "dim": message("dim", "-4 <= dim < 4", "7"),
    "eps": message("eps", ">= 0", "-1"),
}


def spoil(model: nn.Module, how: str) -> None:
    originals = model.back.image.parametrizations.weight
    g, v = originals.original0, originals.original1
    if how == "g on meta":
        originals.original0 = nn.Parameter(g.detach().to("meta"))
    elif how == "v on meta":
        originals.original1 = nn.Parameter(v.detach().to("meta"))
    elif how == "shape of g":
        originals.original0 = nn.Parameter(torch.ones(5, 1, 1, 1))
    elif how == "complex g":
        originals.original0 = nn.Parameter(g.detach().to(torch.complex64))
    elif how == "dim":
        originals[0].dim = 7
    elif how == "eps":
        originals[0].eps = -1.0


def read(model: nn.Module, names: list[str]) -> dict[str, Tensor | Exception]:
    """What comes when weights are read in an order."""
    found: dict[str, Tensor | Exception] = {}
    for name in names:
        try:
            found[name] = model.get_submodule(name).parametrizations.weight()
        except Exception as error:
            found[name] = error
    return found


@both_modes
@pytest.mark.parametrize("first", [0, 3], ids=["a good one first", "the bad one first"])
@pytest.mark.parametrize("how", BAD_MEMBERS)
def test_one_bad_member_spoils_no_other(route, computed: Computed, how, first, reuse):
    model, twin, group = twins(reuse)
    names = [*LAYERS[first:], *LAYERS[:first]]
    healthy = model.back.image.parametrizations.weight
    kept = healthy.original0, healthy.original1
    for _ in range(2):
        spoil(model, how)
        group.refresh()  # the version mode does not see a change of dim or eps
        with group.scope():
            found = read(model, names)
        error = found.pop("back.image")
        assert isinstance(error, (TypeError, ValueError, RuntimeError))
        alone = read(model, ["back.image"])["back.image"]
        assert (type(alone), str(alone)) == (type(error), str(error))
        if route != "cpu" or how != "v on meta":  # that backend takes nothing that is elsewhere
            with pytest.raises(type(error), match=BAD_MEMBERS[how]):
                raise error
        for name, w in found.items():
            assert_same(w, weights(twin)[name], name)
        sum(w.sum(dtype=torch.float64) for w in found.values()).backward()
        healthy.original0, healthy.original1 = kept
        healthy[0].dim, healthy[0].eps = 0, 0.0
        assert_same_models(model, twin)
        model.zero_grad()
    computed.take()
    group.refresh()
    with group.scope():
        read(model, names)
    assert computed.take() == ([7], 0)


def test_a_model_with_a_bad_member_can_be_fused():
    model = Net()
    spoil(model, "g on meta")
    group = wnkernel.fuse(model)
    with pytest.raises(ValueError, match=message("g", f"device {here()}", "meta")):
        model()
    assert group.memory()["slots"] == 0
    group.remove()
    assert_plain(model)


# Groups without a model


@both_modes
def test_a_group_whose_model_is_gone(reuse):
    model = Net()
    group = wnkernel.fuse(model, reuse=reuse)
    model()
    del model
    gc.collect()
    for _ in range(2):
        with group.scope(), group.scope():
            group.refresh()
        assert group.layers == []
        assert group.memory()["slots"] == 0
        assert repr(group) == f"WeightNormGroup(0 weights, reuse={reuse!r})"
        group.remove()


@both_modes
def test_a_model_that_goes_within_its_scope(reuse):
    model = Net()
    group = wnkernel.fuse(model, reuse=reuse)
    with group.scope():
        model()
        del model
        gc.collect()
    assert group.layers == []


@both_modes
def test_remove_within_a_scope(computed: Computed, reuse):
    model, twin, group = twins(reuse)
    with group.scope():
        model()
        group.remove()
        assert_same_models(model, twin)
        assert group.memory()["slots"] == 0
    assert_same_models(model, twin)
    computed.take()
    model()
    assert computed.take() == ([], 7)


@pytest.mark.parametrize("kind", ["torch", "legacy"])
def test_weight_norms_of_torch_are_to_be_converted_first(kind):
    model = nn.Sequential(APPLY[kind](nn.Linear(3, 2)))
    with pytest.raises(ValueError, match=r"wnkernel.convert\(model\) first"):
        wnkernel.fuse(model)


def test_a_group_is_no_model():
    """``model = fuse(model)``."""
    group = wnkernel.fuse(Net())
    with pytest.raises(TypeError, match=r"write fuse\(model\), then model\(x\)"):
        group()
    with pytest.raises(AttributeError, match=r"'parameters'.* changes the model in place"):
        group.parameters()
