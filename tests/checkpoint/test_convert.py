"""``convert_state_dict``: dicts alone, with no model."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict
from collections.abc import Mapping

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrizations import weight_norm as torch_weight_norm

import wnkernel
from wnkernel import convert_state_dict
from wnkernel.keys import weight_keys

from ..cases import DTYPES, EMPTY_SHAPES, SHAPES, g_shape, shape_dims
from ..checkpoints import LAYOUTS, all_layouts, g_and_v, ours, saved, unchanged
from ..layers import (
    APPLY,
    LAYERS,
    all_dims,
    all_kinds,
    all_layers,
    assert_same_state,
    legacy_weight_norm,
)

PAIRED = ["parametrized", "legacy"]
all_pairs = pytest.mark.parametrize("layout", PAIRED)
all_targets = pytest.mark.parametrize("to", LAYOUTS)
both_ways = pytest.mark.parametrize(("source", "to"), [PAIRED, PAIRED[::-1]], ids=" to ".join)


def pair(layout, g, v, name="weight", prefix=""):
    kind = "torch" if layout == "parametrized" else "legacy"
    return dict(zip(g_and_v(name, kind, prefix), (g, v), strict=True))


def linear():
    return nn.Linear(5, 4)


def fold(v, g, dim=0):
    with torch.no_grad():
        return wnkernel.functional.weight_norm(v, g, dim)


@both_ways
@all_dims
@all_layers
def test_what_one_of_torchs_layers_saves_becomes_what_the_other_saves(layer, dim, source, to):
    build, name, _ = LAYERS[layer]
    plain = build()
    checkpoint, want = saved(plain, source, name, dim), saved(plain, to, name, dim)
    with unchanged(checkpoint):
        converted = convert_state_dict(checkpoint, to)
    assert converted.keys() == want.keys()
    for key, t in converted.items():
        assert torch.equal(t, want[key])
        assert any(t is other for other in checkpoint.values())
    back = convert_state_dict(converted, source)
    assert list(back) == list(checkpoint)
    assert all(back[key] is t for key, t in checkpoint.items())
    target = APPLY["torch" if to == "parametrized" else "legacy"](build(), name, dim)
    target.load_state_dict(converted, strict=True)


@all_dims
@all_layers
def test_folded_weights_are_those_of_our_layers(route, layer, dim):
    build, name, _ = LAYERS[layer]
    checkpoint = saved(build(), "legacy", name, dim)
    target = ours(build(), name, dim)
    target.load_state_dict(checkpoint)
    with unchanged(checkpoint):
        folded = convert_state_dict(checkpoint, "folded")
    assert folded.keys() == build().state_dict().keys()
    assert torch.equal(folded[name], getattr(target, name))
    assert not folded[name].requires_grad
    build().load_state_dict(folded, strict=True)


@pytest.mark.parametrize(("shape", "dim"), shape_dims(SHAPES | EMPTY_SHAPES))
def test_the_dim_follows_from_the_shapes(shape, dim):
    g, v = torch.rand(g_shape(shape, dim)) + 0.5, torch.randn(shape)
    for layout in PAIRED:
        folded = convert_state_dict(pair(layout, g, v), "folded")
        assert list(folded) == ["weight"]
        assert torch.equal(folded["weight"], fold(v, g, dim))


@pytest.mark.parametrize("shape", [(1,), (1, 1)], ids=str)
def test_one_norm_in_more_dims_than_it_needs(shape):
    """A scalar, as torch 0.3 saved it, and one kept like the norms of a dim."""
    g, v = torch.full(shape, 3.0), torch.randn(4, 5)
    folded = convert_state_dict(pair("legacy", g, v), "folded")
    assert torch.equal(folded["weight"], fold(v, g.reshape(()), None))
    assert convert_state_dict(pair("legacy", g, v))[g_and_v()[0]] is g


@all_pairs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_are_kept(layout, dtype):
    g, v = torch.rand(4, 1), torch.randn(4, 5).to(dtype)
    folded = convert_state_dict(pair(layout, g, v), "folded")["weight"]
    assert folded.dtype == dtype
    assert torch.equal(folded, fold(v, g))


@all_pairs
def test_memory_formats_are_kept(layout):
    v = torch.randn(4, 6, 3, 3).contiguous(memory_format=torch.channels_last)
    folded = convert_state_dict(pair(layout, torch.rand(4, 1, 1, 1), v), "folded")["weight"]
    assert folded.is_contiguous(memory_format=torch.channels_last)


@all_pairs
def test_a_folded_weight_is_saved_alone(layout):
    weights = {f"{k}.": (torch.rand(4, 1), torch.randn(4, 5)) for k in range(20)}
    checkpoint = {}
    for prefix, (g, v) in weights.items():
        checkpoint |= pair(layout, g, v, prefix=prefix)
    for t in convert_state_dict(checkpoint, "folded").values():
        assert t.untyped_storage().nbytes() == t.nbytes


@all_pairs
def test_tensors_on_the_meta_device(layout):
    g, v = torch.rand(4, 1, device="meta"), torch.randn(4, 5, device="meta")
    folded = convert_state_dict(pair(layout, g, v), "folded")
    assert folded["weight"].is_meta
    assert folded["weight"].shape == v.shape


def test_pairs_take_the_place_of_what_they_replace():
    checkpoint = {
        "first": torch.zeros(1),
        "a.weight_g": torch.rand(4, 1),
        "between": torch.zeros(1),
        "a.weight_v": torch.randn(4, 5),
        "b.weight_v": torch.randn(4, 5),
        "within": torch.zeros(1),
        "b.weight_g": torch.rand(4, 1),
        "last": torch.zeros(1),
    }
    a, b = g_and_v(prefix="a."), g_and_v(prefix="b.")
    parametrized = convert_state_dict(checkpoint, "parametrized")
    assert list(parametrized) == ["first", a[0], "between", a[1], b[1], "within", b[0], "last"]
    assert list(convert_state_dict(parametrized, "legacy")) == list(checkpoint)
    folded = ["first", "a.weight", "between", "b.weight", "within", "last"]
    assert list(convert_state_dict(checkpoint, "folded")) == folded
    assert list(convert_state_dict(parametrized, "folded")) == folded
    like = convert_state_dict(
        convert_state_dict(checkpoint, "folded"), "parametrized", like=parametrized
    )
    assert list(like) == ["first", *a, "between", *b, "within", "last"]


@all_targets
def test_layouts_mix_in_one_dict(to):
    checkpoint = {
        **{f"a.{k}": t for k, t in saved(linear(), "parametrized").items()},
        **{f"b.{k}": t for k, t in saved(linear(), "legacy").items()},
        **{f"c.{k}": t for k, t in saved(linear(), "folded").items()},
    }
    converted = convert_state_dict(checkpoint, to)
    keys = {"folded": ["weight"], "legacy": g_and_v(kind="legacy"), "parametrized": g_and_v()}[to]
    want = {"a.bias", "b.bias", "c.bias", "c.weight"} | {f"{m}.{k}" for m in "ab" for k in keys}
    assert set(converted) == want
    assert converted["c.weight"] is checkpoint["c.weight"]


@all_layouts
@all_targets
def test_a_second_conversion_changes_nothing(layout, to):
    once = convert_state_dict(saved(linear(), layout), to)
    twice = convert_state_dict(once, to)
    assert twice is not once
    assert list(twice) == list(once)
    assert all(twice[key] is t for key, t in once.items())


def nested(name, apply):
    layer = APPLY["torch"](linear())
    apply(layer.parametrizations.weight, name)
    return layer.state_dict()


def nothing_normed():
    g, v = torch.rand(4, 1), torch.randn(4, 5)
    below = "parametrizations.weight."
    stacked = spectral_norm(APPLY["torch"](linear())).state_dict()
    return {
        "empty": {},
        "other things": {"epoch": 3, "name": "x", "extra": b"\0", 7: g, None: v, "_g": g, "_v": v},
        "nested": {"model": pair("legacy", g, v), "optimizer": {"state": {}}},
        "a lone g": {"weight_g": g},
        "a lone v": {"weight_v": v},
        "a v and another one": {"scale": g, "scale_v": v},
        "shapes": {"weight_g": torch.rand(4), "weight_v": v},
        "shapes of another weight": {"weight_g": torch.rand(3, 1), "weight_v": v},
        "two dims": {"weight_g": torch.rand(4, 5, 1), "weight_v": torch.rand(4, 5, 6)},
        "integers": {"weight_g": g.int(), "weight_v": v.int()},
        "integers for norms": {"weight_g": g.int(), "weight_v": v},
        "complex": {"weight_g": g.cfloat(), "weight_v": v.cfloat()},
        "sparse": {"weight_g": g, "weight_v": v.to_sparse()},
        "no tensors": {"weight_g": [1.0], "weight_v": None},
        "scalars": {"weight_g": torch.tensor(1.0), "weight_v": torch.tensor(1.0)},
        # RWKV
        "mixing coefficients": {
            "att.time_maa_g": torch.rand(1, 1, 8),
            "att.time_maa_v": torch.rand(1, 1, 8),
        },
        "a scalar and something": {"loss_g": torch.tensor(1.0), "loss_v": v},
        "spectral norm": spectral_norm(linear()).state_dict(),
        "more on top": stacked,
        "more on g": nested("original0", spectral_norm),
        "more on v": nested("original1", spectral_norm),
        "a weight norm on v": nested("original1", torch_weight_norm),
        "a third original": {f"{below}original{k}": t for k, t in enumerate((g, v, v))},
        "other originals": {f"{below}original0": v, f"{below}original1": v},
        "a weight norm with a state": {
            f"{below}original0": g,
            f"{below}original1": v,
            f"{below}0.temperature": torch.ones(1),
        },
    }


@all_targets
@pytest.mark.parametrize("case", nothing_normed())
def test_what_is_no_weight_norm_is_left_alone(case, to):
    checkpoint = nothing_normed()[case]
    with unchanged(checkpoint):
        converted = convert_state_dict(checkpoint, to)
    assert converted is not checkpoint
    assert list(converted) == list(checkpoint)
    assert all(converted[key] is t for key, t in checkpoint.items())


@pytest.mark.parametrize("name", ["weight", "weight_hh_l0", "in_proj_weight"])
@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 64, 1), (1, 1)], ids=str)
def test_rows_of_one_element_are_weights_if_they_are_called_so(name, shape):
    """Convolutions with a kernel of one, from one channel or to one."""
    g, v = torch.rand(g_shape(shape, 0)), torch.randn(shape)
    converted = convert_state_dict(pair("legacy", g, v, name, "conv."))
    assert set(converted) == set(g_and_v(name, prefix="conv."))


@pytest.mark.parametrize("rows", [2, 4])
def test_weights_of_any_name_with_longer_rows(rows):
    checkpoint = pair("legacy", torch.rand(rows, 1), torch.randn(rows, 5), "codebook", "a.b_g.")
    assert set(convert_state_dict(checkpoint)) == set(g_and_v("codebook", prefix="a.b_g."))


def test_a_module_called_parametrizations():
    prefix = "parametrizations.parametrizations.x.parametrizations."
    checkpoint = pair("legacy", torch.rand(4, 1), torch.randn(4, 5), prefix=prefix)
    parametrized = convert_state_dict(checkpoint)
    assert set(parametrized) == set(g_and_v(prefix=prefix))
    assert list(convert_state_dict(parametrized, "legacy")) == list(checkpoint)


@all_kinds
@all_targets
def test_tied_weights_stay_tied(kind, to):
    with torch.no_grad():
        layer = APPLY[kind](linear())
    model = nn.ModuleDict({"a": layer, "b": layer, "c": APPLY[kind](linear())})
    checkpoint = model.state_dict()
    converted = convert_state_dict(checkpoint, to)
    for key, t in converted.items():
        if key.startswith("a."):
            twin = converted["b" + key[1:]]
            assert twin.data_ptr() == t.data_ptr()
            assert converted["c" + key[1:]].data_ptr() != t.data_ptr()
    if to == "folded":
        assert converted["a.weight"] is converted["b.weight"]
        split = convert_state_dict(converted, "legacy", like=checkpoint)
        assert split["a.weight_g"] is split["b.weight_g"]
        assert split["a.weight_v"] is converted["a.weight"]


def test_weights_that_share_one_tensor_only():
    g, v, other = torch.rand(4, 1), torch.randn(4, 5), torch.rand(4, 1)
    checkpoint = pair("legacy", g, v, prefix="a.") | pair("legacy", other, v, prefix="b.")
    folded = convert_state_dict(checkpoint, "folded")
    assert torch.equal(folded["a.weight"], fold(v, g))
    assert torch.equal(folded["b.weight"], fold(v, other))


SHARED = torch.arange(32.0).sin()
HALVES = SHARED.half()
VIEWS = {
    "offset": lambda: (SHARED[:16].view(4, 4), SHARED[16:].view(4, 4)),
    "shape": lambda: (SHARED[:16].view(4, 4), SHARED[:8].view(2, 4)),
    "stride": lambda: (SHARED[:16].view(4, 4), SHARED[:16].view(4, 4).T),
    "dtype": lambda: (HALVES.view(4, 8), HALVES.view(torch.bfloat16).view(4, 8)),
}


@pytest.mark.parametrize("what", VIEWS)
def test_weights_that_are_other_parts_of_one_memory_are_not_tied(what):
    """As those of a flat buffer are."""
    one, other = VIEWS[what]()
    g = torch.rand(4, 1)
    checkpoint = pair("legacy", g, one, prefix="a.")
    checkpoint |= pair("legacy", g[: len(other)], other, prefix="b.")
    folded = convert_state_dict(checkpoint, "folded")
    assert torch.equal(folded["a.weight"], fold(one, g))
    assert torch.equal(folded["b.weight"], fold(other, g[: len(other)]))


@all_targets
def test_the_dict_of_a_module_keeps_its_type_and_metadata(to):
    checkpoint = nn.Sequential(APPLY["torch"](linear())).state_dict()
    assert isinstance(checkpoint, OrderedDict)
    before = copy.deepcopy(checkpoint._metadata)
    converted = convert_state_dict(checkpoint, to)
    assert isinstance(converted, OrderedDict)
    assert converted._metadata == before
    converted._metadata[""]["assign_to_params_buffers"] = True  # as load_state_dict does
    assert checkpoint._metadata == before
    assert type(convert_state_dict(dict(checkpoint), to)) is dict


@all_targets
def test_parameters_stay_parameters(to):
    layer = APPLY["torch"](linear())
    layer.bias.requires_grad_(False)
    layer.parametrizations.weight.original0.requires_grad_(False)
    checkpoint = layer.state_dict(keep_vars=True)
    converted = convert_state_dict(checkpoint, to)
    assert converted["bias"] is layer.bias
    assert all(isinstance(t, nn.Parameter) for t in converted.values())
    if to == "folded":
        assert converted["weight"].requires_grad
        assert converted["weight"].is_leaf
        split = convert_state_dict(converted, "legacy", like=layer)
        assert isinstance(split["weight_g"], nn.Parameter)


def test_eps_is_that_of_the_layers():
    v = torch.cat([torch.zeros(1, 5), torch.randn(3, 5)])
    checkpoint = pair("legacy", torch.ones(4, 1), v)
    assert convert_state_dict(checkpoint, "folded")["weight"][0].isnan().all()
    folded = convert_state_dict(checkpoint, "folded", eps=1e-12)["weight"]
    assert torch.equal(folded[0], torch.zeros(5))


def test_g_and_v_on_two_devices():
    checkpoint = pair("legacy", torch.rand(4, 1), torch.empty(4, 5, device="meta"))
    assert convert_state_dict(checkpoint, "folded")["weight"].is_meta


@both_ways
def test_values_of_any_kind_survive_a_file(source, to):
    g, v = torch.tensor([[torch.nan], [-0.0], [1e-45], [torch.inf]]), torch.randn(4, 5)
    file = io.BytesIO()
    torch.save(convert_state_dict(pair(source, g, v), to), file)
    file.seek(0)
    back = convert_state_dict(torch.load(file, weights_only=True), source)
    for got, want in zip(back.values(), (g, v), strict=True):
        assert torch.equal(got.view(torch.int32), want.view(torch.int32))


def test_fused_and_legacy_models_convert_alike():
    model = nn.Sequential(wnkernel.weight_norm(linear()), wnkernel.weight_norm(nn.Linear(4, 3)))
    before = copy.deepcopy(model.state_dict())
    wnkernel.fuse(model)
    model(torch.ones(1, 5))
    assert_same_state(model.state_dict(), before)
    legacy = nn.Sequential(legacy_weight_norm(linear()), legacy_weight_norm(nn.Linear(4, 3)))
    legacy.load_state_dict(convert_state_dict(model.state_dict(), "legacy"), strict=True)
    assert torch.equal(legacy[1].weight_v, before["1.parametrizations.weight.original1"])


class OnDemand(Mapping):
    """A checkpoint whose tensors are made when they are asked for, and freed afterwards."""

    def __init__(self, state_dict):
        self._state_dict = state_dict

    def __getitem__(self, key):
        return self._state_dict[key].clone()

    def __iter__(self):
        return iter(self._state_dict)

    def __len__(self):
        return len(self._state_dict)


def test_tensors_that_are_made_on_demand_are_not_mistaken_for_each_other():
    checkpoint = {}
    for k in range(40):
        g, v = weight_keys(f"{k}.weight", "parametrized")
        checkpoint |= {g: torch.full((4, 1), k + 1.0), v: torch.randn(4, 5)}
    want = convert_state_dict(checkpoint, "folded")
    got = convert_state_dict(OnDemand(checkpoint), "folded")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], w) for key, w in want.items())
