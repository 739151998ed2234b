"""``convert_state_dict``: what ``like`` adds, and dicts that contradict themselves."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm, spectral_norm
from torch.nn.utils.weight_norm import WeightNorm as LegacyHook

import wnkernel
from wnkernel import convert_state_dict, native

from ..checkpoints import LAYOUTS, g_and_v, loaded, saved, unchanged
from ..layers import APPLY, LAYERS, all_dims, all_kinds, all_layers

PAIRED = ["parametrized", "legacy"]
all_pairs = pytest.mark.parametrize("layout", PAIRED)
all_targets = pytest.mark.parametrize("to", LAYOUTS)
KIND = {"parametrized": "torch", "legacy": "legacy"}


def linear():
    return nn.Linear(5, 4)


# like


@pytest.mark.parametrize("to", PAIRED)
@all_dims
@all_layers
def test_folded_weights_are_split_as_by_the_layers_of_like(layer, dim, to):
    build, name, _ = LAYERS[layer]
    folded, like = build().state_dict(), wnkernel.weight_norm(build(), name, dim)
    with unchanged(folded):
        split = convert_state_dict(folded, to, like=like)
    normed = build()
    normed.load_state_dict(folded)
    target = APPLY[KIND[to]](build(), name, dim)
    target.load_state_dict(split, strict=True)
    for got, want in zip(
        loaded(target, name), loaded(wnkernel.weight_norm(normed, name, dim), name), strict=True
    ):
        assert torch.equal(got, want)
    assert split[g_and_v(name, KIND[to])[1]] is folded[name]


def test_a_tied_weight_is_split_as_each_of_its_layers_does():
    """Of another dim, by torch, whose long norms are others, and with a bound."""

    def layer():
        return nn.Linear(5000, 4, bias=False)

    layers = {
        "a": wnkernel.weight_norm(layer()),
        "b": wnkernel.weight_norm(layer(), dim=1),
        "c": APPLY["torch"](layer()),
        "d": wnkernel.weight_norm(layer(), eps=1e3),
    }
    w = torch.linspace(-1, 1, 4 * 5000).view(4, 5000).exp()
    split = convert_state_dict(
        {f"{name}.weight": w for name in layers}, "legacy", like=nn.ModuleDict(layers)
    )
    for name, like in layers.items():
        alone = convert_state_dict({"weight": w}, "legacy", like=like)
        assert torch.equal(split[f"{name}.weight_g"], alone["weight_g"])
    # The kernels sum in another order than torch, so a and c show which of the two was asked.
    assert torch.equal(split["a.weight_g"], split["c.weight_g"]) is not native.loaded()


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("like_shape", [(), (1,)])
def test_one_norm_gets_the_shape_that_it_has_in_like(shape, like_shape):
    def checkpoint(shape):
        return {"weight_g": torch.full(shape, 2.0), "weight_v": torch.ones(4, 5)}

    source = checkpoint(shape)
    converted = convert_state_dict(source, like=checkpoint(like_shape))
    g = converted[g_and_v()[0]]
    assert g.shape == like_shape
    assert (g is source["weight_g"]) == (shape == like_shape)
    one_row = {"weight_g": torch.full((1, 1), 2.0), "weight_v": torch.ones(4, 5)}
    assert convert_state_dict(one_row, like=checkpoint(like_shape))[g_and_v()[0]].shape == (1, 1)


@pytest.mark.parametrize("frozen", ["g", "v", "both", "none"])
def test_a_folded_parameter_is_trained_if_one_of_its_own_was(frozen):
    layer = APPLY["legacy"](nn.Linear(5, 4))
    layer.weight_g.requires_grad_(frozen not in ("g", "both"))
    layer.weight_v.requires_grad_(frozen not in ("v", "both"))
    folded = convert_state_dict(layer.state_dict(keep_vars=True), "folded")
    assert isinstance(folded["weight"], nn.Parameter)
    assert folded["weight"].requires_grad == (frozen != "both")


@pytest.mark.parametrize("to", PAIRED)
@all_kinds
def test_like_is_a_module_of_any_kind_or_its_state_dict(kind, to):
    like, folded = APPLY[kind](nn.LSTM(2, 3), "weight_hh_l0"), nn.LSTM(2, 3).state_dict()
    splits = [convert_state_dict(folded, to, like=m) for m in (like, like.state_dict())]
    for split in splits:
        keys = g_and_v("weight_hh_l0", KIND[to])
        assert split.keys() == folded.keys() - {"weight_hh_l0"} | set(keys)
        torch.testing.assert_close(split[keys[0]], splits[0][keys[0]], rtol=3e-7, atol=0)


def test_only_what_is_normed_in_like_is_split():
    like = nn.Sequential(linear(), wnkernel.weight_norm(linear()), wnkernel.weight_norm(linear()))
    checkpoint = nn.Sequential(linear(), linear()).state_dict()  # and not the last
    checkpoint["1.extra"] = torch.ones(1)
    split = convert_state_dict(checkpoint, like=like)
    assert list(split) == ["0.weight", "0.bias", *g_and_v(prefix="1."), "1.bias", "1.extra"]
    assert convert_state_dict(checkpoint, "folded", like=like).keys() == checkpoint.keys()
    assert convert_state_dict(checkpoint).keys() == checkpoint.keys()


@all_pairs
def test_pairs_need_no_splitting(layout):
    checkpoint = {f"1.{key}": t for key, t in saved(linear(), layout).items()}
    checkpoint |= {f"0.{key}": t for key, t in saved(linear(), "folded").items()}
    like = nn.Sequential(*(wnkernel.weight_norm(linear()) for _ in range(2)))
    converted = convert_state_dict(checkpoint, layout, like=like)
    assert all(converted[key] is t for key, t in checkpoint.items() if key[0] == "1")
    assert converted.keys() == convert_state_dict(like.state_dict(), layout).keys()


@pytest.mark.parametrize("to", PAIRED)
@all_kinds
def test_layers_in_two_places_are_split_in_both(kind, to):
    layer = APPLY[kind](linear())
    like = nn.ModuleDict({"a": layer, "b": layer})
    folded = nn.ModuleDict({"a": linear(), "b": linear()}).state_dict()
    split = convert_state_dict(folded, to, like=like)
    assert split.keys() == convert_state_dict(like.state_dict(), to).keys()


class Mixing(nn.Module):
    """Parameters as RWKV calls them, some of which are under weight norm."""

    def __init__(self, apply):
        super().__init__()
        self.time_mix = nn.Parameter(torch.randn(1, 1, 8))
        for name in ("other_g", "other_v", "weight_g", "weight_v"):
            self.register_parameter(name, nn.Parameter(torch.randn(1, 1, 8)))
        if apply:
            APPLY[apply](self, "time_mix", 2)


@all_kinds
def test_names_that_say_nothing_are_known_from_like(kind):
    like, pairs = Mixing(kind), Mixing("legacy").state_dict()
    converted = convert_state_dict(pairs, like=like)
    assert set(converted) == {"other_g", "other_v", *g_and_v(), *g_and_v("time_mix")}
    folded = convert_state_dict(Mixing(None).state_dict(), "legacy", like=like)
    assert set(folded) == {"other_g", "other_v", "weight_g", "weight_v", "time_mix_g", "time_mix_v"}


def test_what_only_looks_normed_in_a_module_is_not_split():
    checkpoint = {"weight": torch.randn(1, 1, 8), "other_g": torch.ones(1)}
    assert list(convert_state_dict(checkpoint, like=Mixing("legacy"))) == ["weight", "other_g"]


def test_what_is_stacked_in_like_is_left_folded():
    like = spectral_norm(wnkernel.weight_norm(linear()))
    assert list(convert_state_dict(linear().state_dict(), like=like)) == ["weight", "bias"]


def test_eps_is_that_of_the_layers_of_a_module():
    model = nn.Sequential(
        wnkernel.weight_norm(linear(), eps=10.0), wnkernel.weight_norm(nn.Linear(4, 4), eps=20.0)
    )
    model.append(APPLY["torch"](nn.Linear(4, 3)))
    checkpoint = model.state_dict()
    checkpoint |= {f"1.{key}": checkpoint[f"0.{key}"] for key in g_and_v()}  # tied but for eps
    model = nn.Sequential(model[0], wnkernel.weight_norm(linear(), eps=20.0), model[2])
    model.load_state_dict(checkpoint | {"1.bias": torch.ones(4)})
    folded = convert_state_dict(checkpoint, "folded", like=model)
    for k, layer in enumerate(model):
        assert torch.equal(folded[f"{k}.weight"], layer.weight), k
    asked = convert_state_dict(checkpoint, "folded", like=model, eps=5.0)["0.weight"]
    torch.testing.assert_close(asked, 2 * model[0].weight.detach())


class Half(nn.Module):
    """A parametrization without keys."""

    def forward(self, w):
        return w / 2


class Halved(_WeightNorm):
    def forward(self, weight_g, weight_v):
        return super().forward(weight_g, weight_v) / 2


class HalvedOurs(wnkernel.WeightNorm):
    def forward(self, weight_g, weight_v):
        return super().forward(weight_g, weight_v) / 2


class ScaledRows(nn.Module):
    """No weight norm, but of two tensors whose shapes would do for one."""

    def forward(self, scale, rows):
        return scale * rows

    def right_inverse(self, weight):
        return torch.ones(len(weight), 1), weight


class HalvedHook(LegacyHook):
    def compute_weight(self, module):
        return super().compute_weight(module) / 2


def computed_otherwise(how):
    layer = APPLY["legacy" if how == "hook" else "torch"](linear())
    if how == "hook":
        next(iter(layer._forward_pre_hooks.values())).__class__ = HalvedHook
    elif how == "norm":
        layer.parametrizations.weight[0].__class__ = Halved
    elif how == "norm of ours":
        layer = APPLY["ours"](linear())
        layer.parametrizations.weight[0].__class__ = HalvedOurs
    elif how == "rows":
        layer = linear()
        parametrize.register_parametrization(layer, "weight", ScaledRows())
    elif how == "nested":
        parametrize.register_parametrization(layer.parametrizations.weight, "original1", Half())
    else:
        parametrize.register_parametrization(layer, "weight", Half())
    return layer


@all_targets
@pytest.mark.parametrize("how", ["stack", "nested", "norm", "norm of ours", "rows", "hook"])
def test_what_a_module_computes_otherwise_is_left_alone(how, to):
    like = nn.Sequential(computed_otherwise(how), wnkernel.weight_norm(linear()))
    checkpoint = like.state_dict()
    converted = convert_state_dict(checkpoint, to, like=like)
    assert [key for key in converted if key[0] == "0"] == [
        key for key in checkpoint if key[0] == "0"
    ]
    keys = ("weight",) if to == "folded" else g_and_v(kind=KIND[to])
    assert {f"1.{key}" for key in keys} < converted.keys()
    g, v = g_and_v(kind="legacy", prefix="0.")
    for other in ({"0.weight": torch.ones(4, 5)}, {g: torch.ones(4, 1), v: torch.ones(4, 5)}):
        assert convert_state_dict(other, to, like=like).keys() == other.keys()


@pytest.mark.parametrize("layout", LAYOUTS)
@all_targets
def test_a_dict_with_other_prefixes_than_like(to, layout):
    like = nn.Sequential(linear(), wnkernel.weight_norm(linear()))
    checkpoint = {f"1.{key}": t for key, t in saved(linear(), layout).items()}
    wrapped = {f"module.{key}": t for key, t in checkpoint.items()}
    for sd, m in (
        (wrapped, like),
        (wrapped, like.state_dict()),
        (checkpoint, nn.DataParallel(like)),
        (checkpoint, torch.compile(like)),
        ({"state_dict": checkpoint}, like),
    ):
        error = f'"[a-z_.]*1.weight".*begins with {next(iter(sd))!r}: prefixes'
        with unchanged(sd), pytest.raises(ValueError, match=rf"^like: expected .*{error}"):
            convert_state_dict(sd, to, like=m)
        assert convert_state_dict({}, to, like=m) == {}
        assert convert_state_dict(sd, to, like=linear()).keys() == convert_state_dict(sd, to).keys()


@all_targets
def test_a_dict_with_a_part_of_like(to):
    """One shard of several, say, or an encoder alone."""
    like = nn.Sequential(linear(), wnkernel.weight_norm(linear()))
    for layer in like:
        part = {f"{[*like].index(layer)}.{key}": t for key, t in layer.state_dict().items()}
        assert len(convert_state_dict(part, to, like=like)) in (2, 3)
    for layout in LAYOUTS:
        part = {f"1.{key}": t for key, t in saved(linear(), layout).items() if key != "bias"}
        for known in (like, like.state_dict()):
            keys = convert_state_dict(part, to, like=known).keys()
            assert keys == set(
                ("1.weight",) if to == "folded" else g_and_v(kind=KIND[to], prefix="1.")
            )


@pytest.mark.parametrize(
    ("weight", "got"),
    [
        (torch.ones(4, 6), r"torch\.float32 \[4, 6\]"),
        (torch.ones(4, 5, dtype=torch.int64), r"torch\.int64 \[4, 5\]"),
        ([1.0], "list"),
    ],
    ids=["shape", "dtype", "type"],
)
def test_a_weight_that_is_not_the_one_in_like(weight, got):
    like = nn.Sequential(wnkernel.weight_norm(linear()))
    expected = rf'^state_dict: expected a floating-point "0.weight" of shape \[4, 5\].*got {got}'
    with pytest.raises(ValueError, match=expected):
        convert_state_dict({"0.weight": weight}, like=like)


# errors


def refusal(checkpoint, to, **options):
    with unchanged(checkpoint), pytest.raises(ValueError, match=r"^state_dict: expected") as raised:
        convert_state_dict(checkpoint, to, **options)
    return str(raised.value)


@all_targets
@pytest.mark.parametrize("which", [0, 1], ids=["g", "v"])
def test_half_of_a_parametrized_pair(which, to):
    checkpoint = {f"a.{key}": t for key, t in saved(linear(), "parametrized").items()}
    keys = g_and_v(prefix="a.")
    del checkpoint[keys[which]]
    nested = f"a.parametrizations.weight.parametrizations.original{1 - which}.original"
    for more in ({}, {nested: torch.ones(4, 1)}):  # of the one that is there
        error = refusal(checkpoint | more, to)
        assert f'expected "{keys[which]}" beside "{keys[1 - which]}", got no such key' in error


def two_spellings():
    plain = linear()
    return saved(plain, "legacy") | saved(plain, "parametrized")


@all_targets
def test_two_spellings_that_agree_become_one(to):
    checkpoint = two_spellings()
    assert checkpoint.keys() == {"bias", "weight_g", "weight_v", *g_and_v()}
    converted = convert_state_dict(checkpoint, to)
    one = {key: t for key, t in checkpoint.items() if "parametrizations" in key}
    want = convert_state_dict(one, to)
    assert converted.keys() == {"bias", *want}
    assert all(torch.equal(converted[key], t) for key, t in want.items())


@all_targets
@pytest.mark.parametrize("which", [0, 1], ids=["g", "v"])
def test_two_spellings_that_differ(which, to):
    checkpoint = two_spellings()
    legacy = g_and_v(kind="legacy")[which]
    checkpoint[legacy] = checkpoint[legacy].nextafter(torch.tensor(torch.inf))
    assert f'got "{g_and_v()[which]}" and "{legacy}", which differ' in refusal(checkpoint, to)


@all_targets
@all_pairs
def test_a_plain_weight_beside_its_pair(layout, to):
    checkpoint = saved(linear(), layout)
    g, v = (checkpoint[key] for key in g_and_v(kind=KIND[layout]))
    checkpoint["weight"] = torch._weight_norm(v, g, 0)
    converted = convert_state_dict(checkpoint, to)
    keys = ("weight",) if to == "folded" else g_and_v(kind=KIND[to])
    assert converted.keys() == {"bias", *keys}
    if to == "folded":
        assert converted["weight"] is checkpoint["weight"]
    like = wnkernel.weight_norm(linear())
    assert convert_state_dict(checkpoint, to, like=like).keys() == converted.keys()
    if narrow := getattr(torch, "float8_e4m3fn", None):
        rounded = {**checkpoint, "weight": checkpoint["weight"].to(narrow)}
        assert convert_state_dict(rounded, to).keys() == converted.keys()
    checkpoint["weight"] = checkpoint["weight"] * 1.001
    error = refusal(checkpoint, to)
    keys = g_and_v(kind=KIND[layout])
    assert f'got "weight", which is not that of "{keys[0]}" and "{keys[1]}"' in error


@pytest.mark.parametrize(
    ("checkpoint", "to", "key"),
    [
        ({**saved(linear(), "legacy"), "weight": torch.ones(3)}, "folded", "weight"),
        ({**saved(linear(), "legacy"), "weight": "taken"}, "folded", "weight"),
        ({**saved(linear(), "legacy"), "weight": torch.ones(4, 5).int()}, "folded", "weight"),
        ({**saved(linear(), "parametrized"), "weight_g": torch.ones(3)}, "legacy", "weight_g"),
        (
            saved(linear(), "legacy")
            | {g_and_v()[1]: torch.ones(4, 5), g_and_v()[0]: torch.ones(5)},
            "parametrized",
            g_and_v()[0],
        ),
    ],
    ids=["another weight", "no tensor", "integers", "half a legacy pair", "other originals"],
)
def test_entries_in_the_way_are_not_overwritten(checkpoint, to, key):
    assert f'expected no "{key}" beside' in refusal(checkpoint, to)


@pytest.mark.parametrize("to", ["new", "Legacy", "", None])
def test_unknown_layouts(to):
    with pytest.raises(
        ValueError, match=r"^to: expected one of 'parametrized', 'legacy', 'folded'"
    ):
        convert_state_dict({}, to)


def test_arguments_of_the_wrong_type():
    with pytest.raises(TypeError, match=r"^state_dict: expected a dict, got Linear"):
        convert_state_dict(linear())
    with pytest.raises(TypeError, match=r"^like: expected a module or a dict, got list"):
        convert_state_dict({}, like=[])
    with pytest.raises(ValueError, match=re.escape("eps: expected a finite number >= 0, got -1")):
        convert_state_dict({}, "folded", eps=-1)
