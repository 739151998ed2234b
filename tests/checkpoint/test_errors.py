"""Dicts that do not say what a weight-normed layer is: an error that names layer, keys, what was
expected and what came, and a layer that stays as it was."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import wnkernel
from wnkernel.checkpoint import agreement

from ..checkpoints import (
    all_layouts,
    expected,
    g_and_v,
    load_error,
    loaded,
    nothing_loaded,
    ours,
    saved,
    unchanged,
)
from ..layers import Doubled, originals

both_pairs = pytest.mark.parametrize("kind", ["torch", "legacy"])
either = pytest.mark.parametrize("which", [0, 1], ids=["g", "v"])
strictness = pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
assigned = pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])

PAIRS = {"torch": "parametrized", "legacy": "legacy"}


def linear():
    return nn.Linear(5, 4)


def model():
    """The layer with errors, and another one."""
    return nn.ModuleDict({"bad": ours(linear()), "good": ours(linear())})


def two(bad, good=None):
    good = good or saved(linear(), "parametrized")
    return {f"bad.{k}": t for k, t in bad.items()} | {f"good.{k}": t for k, t in good.items()}


def refusal(checkpoint, strict=True, assign=False, target=None):
    """The error, after which the weight is as it was and everything else has been loaded."""
    target = target or model()
    weights = target["bad"].parametrizations
    with unchanged(checkpoint), nothing_loaded(weights):
        error = load_error(lambda: target.load_state_dict(checkpoint, strict, assign))
    assert "bad.weight: expected" in error
    assert "the layer is unchanged" in error
    assert error.count("\n") == 1  # nothing else is reported, and this once
    for got, key in zip(loaded(target["good"]), g_and_v(prefix="good."), strict=True):
        assert torch.equal(got, checkpoint[key])
    if "bad.bias" in checkpoint:
        assert torch.equal(target["bad"].bias, checkpoint["bad.bias"])
    return error


@assigned
@strictness
@either
@both_pairs
def test_half_a_pair(kind, which, strict, assign):
    checkpoint = two(saved(linear(), PAIRS[kind]))
    keys = g_and_v(kind=kind, prefix="bad.")
    del checkpoint[keys[which]]
    error = refusal(checkpoint, strict, assign)
    assert f'expected "{keys[which]}" beside "{keys[1 - which]}", got no such key' in error


def test_halves_of_two_layouts_make_no_pair():
    legacy, parametrized = saved(linear(), "legacy"), saved(linear(), "parametrized")
    half = {k: t for k, t in parametrized.items() if k.endswith("original1")}
    error = refusal(two({"weight_g": legacy["weight_g"], **half}), strict=False)
    assert 'expected "bad.parametrizations.weight.original0" beside' in error


@strictness
@either
@both_pairs
def test_a_whole_pair_beside_half_of_the_other(kind, which, strict):
    other = "legacy" if kind == "torch" else "torch"
    half = saved(linear(), PAIRS[other])
    present = g_and_v(kind=other)[which]
    error = refusal(two({**saved(linear(), PAIRS[kind]), present: half[present]}), strict)
    assert f'beside "bad.{present}", got no such key' in error


@assigned
@strictness
@either
@both_pairs
def test_wrong_shapes_of_a_pair(kind, which, strict, assign):
    checkpoint = two(saved(linear(), PAIRS[kind]))
    keys = g_and_v(kind=kind, prefix="bad.")
    checkpoint[keys[which]] = torch.ones(3, 2)
    error = refusal_of_size(checkpoint, strict, assign)
    got = [[4, 1], [4, 5]]
    got[which] = [3, 2]
    assert "expected g of shape [4, 1] and v of shape [4, 5], got " in error
    assert f'got {got[0]} ("{keys[0]}") and {got[1]} ("{keys[1]}")' in error


def refusal_of_size(checkpoint, strict=True, assign=False):
    """torch's own words come first: people and programs look for them."""
    error = refusal(checkpoint, strict, assign)
    assert "size mismatch for bad.weight: " in error
    return error


@pytest.mark.parametrize("shape", [(), (1,), (4,), (1, 5), (5, 1), (1, 4, 1)], ids=str)
def test_a_g_of_another_dim(shape):
    checkpoint = two(saved(linear(), "legacy"))
    checkpoint["bad.weight_g"] = torch.ones(shape)
    assert f"got {list(shape)} (" in refusal_of_size(checkpoint)


@pytest.mark.parametrize("shape", [(5, 4), (4, 5, 1), (20,), (4, 1)], ids=str)
@assigned
def test_wrong_shape_of_a_plain_weight(shape, assign):
    checkpoint = two({"weight": torch.ones(shape), "bias": torch.zeros(4)})
    error = refusal_of_size(checkpoint, assign=assign)
    assert f'expected a weight of shape [4, 5], got {list(shape)} ("bad.weight")' in error


@all_layouts
def test_what_is_no_dense_tensor(layout):
    name = expected_key(layout)
    for value, kind in (
        ([1.0], "list"),
        (None, "NoneType"),
        (torch.ones(4, 5).to_sparse(), "torch.sparse_coo"),
        (torch.quantize_per_tensor(torch.ones(4, 5), 0.1, 0, torch.qint8), "quantized"),
        (torch.ones(4, 5, dtype=torch.int64), "torch.int64"),
        (torch.ones(4, 5, dtype=torch.complex64), "torch.complex64"),
    ):
        checkpoint = two({**saved(linear(), layout), name: value})
        error = refusal(checkpoint, strict=False)
        assert re.search(rf'tensor in "bad.{re.escape(name)}", got .*{kind}', error)


def expected_key(layout):
    """What holds the direction."""
    return {"parametrized": g_and_v()[1], "legacy": "weight_v", "folded": "weight"}[layout]


@strictness
def test_two_spellings_that_agree_are_one(strict):
    plain = linear()
    legacy, parametrized = saved(plain, "legacy"), saved(plain, "parametrized")
    legacy["weight_v"][1, 1] = parametrized[g_and_v()[1]][1, 1] = torch.nan
    target = ours(plain)
    result = target.load_state_dict(legacy | parametrized, strict)
    assert result == ([], [])
    assert torch.equal(loaded(target)[0], legacy["weight_g"])
    torch.testing.assert_close(loaded(target)[1], legacy["weight_v"], equal_nan=True)


@strictness
@either
def test_two_spellings_that_differ(which, strict):
    plain = linear()
    legacy, parametrized = saved(plain, "legacy"), saved(plain, "parametrized")
    one, other = g_and_v()[which], g_and_v(kind="legacy")[which]
    legacy[other] = torch.nextafter(legacy[other], legacy[other] + 1)
    error = refusal(two(legacy | parametrized), strict)
    assert f'got "bad.{one}" and "bad.{other}", which differ' in error


@pytest.mark.parametrize("as_other", [torch.Tensor.double, lambda t: t.half().view(torch.bfloat16)])
def test_two_spellings_of_different_dtypes_differ(as_other):
    """The same values, and the same bits."""
    plain = linear()
    checkpoint = {k: t.half().float() for k, t in saved(plain, "legacy").items()}
    legacy = {k: as_other(t) for k, t in checkpoint.items()}
    parametrized = saved(plain, "parametrized")
    for key, other in zip(g_and_v(), g_and_v(kind="legacy"), strict=True):
        parametrized[key] = checkpoint[other]
        if legacy[other].dtype == torch.bfloat16:
            parametrized[key] = checkpoint[other].half()
    assert "which differ" in refusal(two(legacy | parametrized))


def folded_by(kernel, pair):
    g, v = pair
    return kernel(v, g, 0)


@pytest.mark.parametrize("kernel", [torch._weight_norm, wnkernel.functional.weight_norm])
@both_pairs
def test_a_plain_weight_that_is_that_of_the_pair(kind, kernel):
    """To the last bit it cannot be: who knows what computed it."""
    plain = nn.Linear(500, 40)
    with torch.no_grad():
        plain.weight[3] = 0  # a row of NaN
    checkpoint = saved(plain, PAIRS[kind])
    checkpoint["weight"] = folded_by(kernel, expected(checkpoint, PAIRS[kind]))
    target = ours(plain)
    assert target.load_state_dict(checkpoint) == ([], [])
    assert torch.equal(loaded(target)[0], checkpoint[g_and_v(kind=kind)[0]])
    checkpoint["weight"] = checkpoint["weight"].bfloat16()
    target.load_state_dict(checkpoint)


@strictness
@both_pairs
def test_a_plain_weight_of_something_else(kind, strict):
    checkpoint = saved(linear(), PAIRS[kind])
    w = folded_by(torch._weight_norm, expected(checkpoint, PAIRS[kind]))
    checkpoint["weight"] = torch.cat([w[:3], w[3:] * 1.001])
    keys = g_and_v(kind=kind, prefix="bad.")
    error = refusal(two(checkpoint), strict)
    assert f'got "bad.weight", which is not that of "{keys[0]}" and "{keys[1]}"' in error


def test_a_plain_weight_where_more_is_stacked():
    """It goes down through all of them, as when it is assigned to ``layer.weight``. Whether a pair
    beside it says the same is not computed: what is stacked may change with every call."""
    target = model()
    parametrize.register_parametrization(target["bad"], "weight", Doubled())
    weight = torch.randn(4, 5)
    target.load_state_dict(two({"weight": weight, "bias": torch.zeros(4)}))
    assert torch.equal(originals(target["bad"])[1], weight / 2)
    torch.testing.assert_close(target["bad"].weight, weight)
    checkpoint = saved(linear(), "legacy")
    checkpoint["weight"] = folded_by(torch._weight_norm, expected(checkpoint, "legacy"))
    assert 'got "bad.weight", which is not' in refusal(two(checkpoint), target=target)


class OneWay(nn.Module):
    def forward(self, w):
        return w.tanh()


def test_a_plain_weight_that_cannot_be_split():
    target = model()
    parametrize.register_parametrization(target["bad"], "weight", OneWay())
    checkpoint = two({"weight": torch.ones(4, 5), "bias": torch.zeros(4)})
    error = refusal(checkpoint, target=target)
    assert re.search(r'got the plain weight "bad.weight", which cannot be split \(.*OneWay', error)


class Stubborn(torch.Tensor):
    """A tensor that torch cannot copy."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.copy_, torch.Tensor.module_load):
            raise RuntimeError("not me")
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("swap", [False, True], ids=["in place", "swapped"])
@either
@both_pairs
def test_what_torch_fails_to_copy_leaves_neither_g_nor_v(kind, which, swap):
    checkpoint = two(saved(linear(), PAIRS[kind]))
    key = g_and_v(kind=kind, prefix="bad.")[which]
    checkpoint[key] = checkpoint[key].as_subclass(Stubborn)
    target = model()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        with nothing_loaded(target["bad"].parametrizations):
            error = load_error(lambda: target.load_state_dict(checkpoint))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert f'the parameter named "{g_and_v(prefix="bad.")[which]}"' in error
    assert "not me" in error


def test_what_torch_fails_to_assign_leaves_neither_g_nor_v(monkeypatch):
    target, checkpoint = ours(linear()), saved(linear(), "parametrized")
    set_attribute = nn.Module.__setattr__

    def fail(self, name, value):
        if name == "original1":
            raise RuntimeError("not me")
        set_attribute(self, name, value)

    with monkeypatch.context() as patch, nothing_loaded(target.parametrizations):
        patch.setattr(nn.Module, "__setattr__", fail)
        assert "not me" in load_error(lambda: target.load_state_dict(checkpoint, assign=True))


@either
def test_half_a_pair_for_a_list_of_parametrizations_alone(which):
    target = ours(linear())
    key = ("original0", "original1")[which]
    state = {
        f"weight.{key}": dict(target.parametrizations.weight.named_parameters())[key].detach() + 1
    }
    with unchanged(state), nothing_loaded(target):
        error = load_error(lambda: target.parametrizations.load_state_dict(state, strict=False))
    assert f'weight: expected "weight.original{1 - which}" beside "weight.{key}"' in error


@strictness
def test_a_plain_weight_of_eight_bits_beside_a_pair(strict):
    """Compared as any other, though torch promotes no such dtype."""
    narrow = getattr(torch, "float8_e4m3fn", None)
    if narrow is None:
        pytest.skip("torch without float8")
    pair = saved(linear(), "parametrized")
    w = torch._weight_norm(*(pair[key] for key in reversed(g_and_v())), 0)
    target = ours(linear())
    target.load_state_dict({**pair, "weight": w.to(narrow)}, strict)
    for got, key in zip(loaded(target), g_and_v(), strict=True):
        assert torch.equal(got, pair[key])
    error = refusal(two({**pair, "weight": (1.5 * w).to(narrow)}), strict)
    assert 'got "bad.weight", which is not that of' in error


def test_a_weight_that_cannot_be_compared_with_its_pair(monkeypatch):
    def fail(*_):
        raise RuntimeError("not me")

    monkeypatch.setattr(agreement, "same_up_to_rounding", fail)
    pair = saved(linear(), "parametrized")
    error = refusal(two({**pair, "weight": torch.ones(4, 5)}))
    assert 'got "bad.weight" beside "bad.parametrizations.weight.original0"' in error
    assert "(not me)" in error


def test_every_layer_with_an_error_is_named():
    target = nn.Sequential(*(ours(linear()) for _ in range(3)))
    checkpoint = {"0.weight_g": torch.ones(4, 1), "1.weight": torch.ones(2, 2)}
    checkpoint |= {f"2.{k}": t for k, t in saved(linear(), "legacy").items()}
    with nothing_loaded(target[0], target[1]):
        error = load_error(lambda: target.load_state_dict(checkpoint, strict=False))
    assert "0.weight: expected" in error
    assert "size mismatch for 1.weight" in error
    assert torch.equal(loaded(target[2])[0], checkpoint["2.weight_g"])
