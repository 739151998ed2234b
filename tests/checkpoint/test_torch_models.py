"""``accept_any_layout``: models that keep torch's own weight norm load every layout too."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import wnkernel

from ..checkpoints import (
    LAYOUTS,
    all_layouts,
    assert_loaded,
    g_and_v,
    load_error,
    loaded,
    nothing_loaded,
    ours,
    saved,
    unchanged,
)
from ..layers import APPLY, LAYERS, all_dims, all_layers

KINDS = ["torch", "legacy"]
torchs_kinds = pytest.mark.parametrize("kind", KINDS)


def linear():
    return nn.Linear(5, 4)


def torchs(plain, kind, name="weight", dim=0):
    return APPLY[kind](copy.deepcopy(plain), name, dim)


@all_dims
@all_layers
@all_layouts
@torchs_kinds
def test_every_layout_loads(kind, layout, layer, dim):
    build, name, _ = LAYERS[layer]
    checkpoint, target = saved(build(), layout, name, dim), torchs(build(), kind, name, dim)
    keys, parameters = list(target.state_dict()), dict(target.named_parameters())
    handle = wnkernel.accept_any_layout(target)
    assert handle.weights == [name]
    with unchanged(checkpoint):
        assert target.load_state_dict(checkpoint, strict=True) == ([], [])
    assert_loaded(target, checkpoint, layout, name, dim)
    assert list(target.state_dict()) == keys
    for key, p in target.named_parameters():
        assert p is parameters[key]


@torchs_kinds
def test_a_plain_weight_beside_its_pair_has_to_be_its_weight(kind):
    checkpoint, target = saved(linear(), "legacy"), torchs(linear(), kind)
    g, v = checkpoint["weight_g"], checkpoint["weight_v"]
    checkpoint["weight"] = torch._weight_norm(v, g, 0)
    wnkernel.accept_any_layout(target)
    assert target.load_state_dict(checkpoint, strict=True) == ([], [])
    assert_loaded(target, checkpoint, "legacy")
    checkpoint["weight"] = checkpoint["weight"] + 1e-3
    error = load_error(lambda: target.load_state_dict(checkpoint))
    assert 'expected one weight, got "weight", which is not that of' in error


@all_layouts
@torchs_kinds
def test_assign_and_the_meta_device(kind, layout):
    checkpoint = saved(linear().double(), layout)
    with torch.device("meta"):
        target = torchs(linear(), kind)
    wnkernel.accept_any_layout(target)
    target.load_state_dict(checkpoint, strict=True, assign=True)
    assert_loaded(target, checkpoint, layout)
    assert all(p.dtype == torch.float64 and p.requires_grad for p in target.parameters())


def test_layouts_mix_in_a_model_of_both_kinds_and_ours():
    plain = [linear() for _ in range(9)]
    layers = [
        apply(plain[k]) if apply is ours else torchs(plain[k], apply)
        for k, apply in enumerate([*KINDS, ours] * 3)
    ]
    target = nn.DataParallel(nn.ModuleDict({"blocks": nn.ModuleList(layers)}))
    checkpoint = {}
    for k in range(9):
        part = saved(plain[k], LAYOUTS[k // 3])
        checkpoint |= {f"module.blocks.{k}.{key}": t for key, t in part.items()}
    handle = wnkernel.accept_any_layout(target)
    assert handle.weights == [f"module.blocks.{k}.weight" for k in range(9) if k % 3 != 2]
    with unchanged(checkpoint):
        target.load_state_dict(checkpoint, strict=True)
    for k in range(9):
        assert_loaded(layers[k], saved(plain[k], LAYOUTS[k // 3]), LAYOUTS[k // 3])


@all_layouts
def test_two_weights_of_a_legacy_rnn(layout):
    plain, names = nn.LSTM(3, 4), ("weight_ih_l0", "weight_hh_l0")
    target, checkpoint = copy.deepcopy(plain), {**plain.state_dict()}
    for name in names:
        APPLY["legacy"](target, name)
        del checkpoint[name]
        checkpoint |= {k: t for k, t in saved(plain, layout, name).items() if name in k}
    handle = wnkernel.accept_any_layout(target)
    assert handle.weights == list(names)
    target.load_state_dict(checkpoint, strict=True)
    for name in names:
        assert_loaded(target, saved(plain, layout, name), layout, name)


def state_of_hooks(model):
    return [
        (
            type(m),
            {key: id(t) for key, t in vars(m).items() if not key.startswith("_")},
            "_load_from_state_dict" in vars(m),
            [id(w) for w in m._load_state_dict_pre_hooks.values()],
        )
        for m in model.modules()
    ]


@torchs_kinds
def test_the_handle_is_the_way_back(kind):
    target = nn.Sequential(torchs(linear(), kind))
    before = state_of_hooks(target)
    handle = wnkernel.accept_any_layout(target)
    assert state_of_hooks(target) != before
    handle.remove()
    assert state_of_hooks(target) == before
    assert handle.weights == []
    handle.remove()
    with wnkernel.accept_any_layout(target) as handle:
        assert handle.weights == ["0.weight"]
    assert state_of_hooks(target) == before
    checkpoint = {f"0.{key}": t for key, t in saved(linear(), "folded").items()}
    assert "Missing key" in load_error(lambda: target.load_state_dict(checkpoint))


@torchs_kinds
def test_a_second_call_changes_nothing(kind):
    target = nn.Sequential(torchs(linear(), kind))
    first = wnkernel.accept_any_layout(target)
    before = state_of_hooks(target)
    second = wnkernel.accept_any_layout(target)
    assert second.weights == []
    second.remove()
    assert state_of_hooks(target) == before
    assert first.weights == ["0.weight"]


def test_layers_of_ours_need_none_of_it():
    target = ours(linear())
    before = state_of_hooks(target)
    assert wnkernel.accept_any_layout(target).weights == []
    assert state_of_hooks(target) == before


@torchs_kinds
def test_the_way_back_of_a_model_that_became_ours(kind):
    """The handle outlived what it is about."""
    target = nn.Sequential(torchs(linear(), kind))
    handle = wnkernel.accept_any_layout(target)
    wnkernel.convert(target)
    converted = nn.Sequential(torchs(linear(), kind))
    wnkernel.convert(converted)
    assert type(target[0].parametrizations.weight) is type(converted[0].parametrizations.weight)
    handle.remove()
    assert "_load_from_state_dict" not in vars(target[0])
    for layout in LAYOUTS:
        checkpoint = saved(linear(), layout)
        target[0].load_state_dict(checkpoint, strict=True)
        assert_loaded(target[0], checkpoint, layout)


@torchs_kinds
def test_a_layer_that_is_plain_again_is_plain(kind):
    target = torchs(linear(), kind)
    wnkernel.accept_any_layout(target)
    wnkernel.remove_weight_norm(target)
    assert vars(target).keys() == vars(linear()).keys()
    assert not target._load_state_dict_pre_hooks
    target = torchs(linear(), kind)
    wnkernel.accept_any_layout(target)
    if kind == "torch":
        parametrize.remove_parametrizations(target, "weight")
    else:
        nn.utils.remove_weight_norm(target)
    legacy = saved(linear(), "legacy")
    assert target.load_state_dict(legacy, strict=False) == linear().load_state_dict(
        legacy, strict=False
    )
    folded = saved(linear(), "folded")
    target.load_state_dict(folded, strict=True)
    assert torch.equal(target.weight, folded["weight"])


@all_layouts
def test_a_layer_that_was_parametrized_before(layout):
    """torch leaves a hook behind that breaks its legacy layers."""
    target, checkpoint = torchs(linear(), "torch"), saved(linear(), layout)
    parametrize.remove_parametrizations(target, "weight")
    target = torchs(target, "legacy")
    before = state_of_hooks(target)
    with wnkernel.accept_any_layout(target):
        target.load_state_dict(checkpoint, strict=True)
        assert_loaded(target, checkpoint, layout)
    assert state_of_hooks(target) == before
    handle = wnkernel.accept_any_layout(target)
    wnkernel.convert(target)
    hooks = state_of_hooks(target)
    handle.remove()
    assert state_of_hooks(target) == hooks


@all_layouts
@torchs_kinds
def test_copies_load_alone(kind, layout):
    with torch.no_grad():  # or else torch cannot copy legacy layers
        first = torchs(linear(), kind)
    wnkernel.accept_any_layout(first)
    twin, checkpoint = copy.deepcopy(first), saved(linear(), layout)
    with nothing_loaded(first):
        twin.load_state_dict(checkpoint, strict=True)
    assert_loaded(twin, checkpoint, layout)


def test_a_pickled_legacy_model_is_torchs_again():
    with torch.no_grad():
        target = torchs(linear(), "legacy")
    wnkernel.accept_any_layout(target)
    file = io.BytesIO()
    torch.save(target, file)
    file.seek(0)
    restored = torch.load(file, weights_only=False)
    checkpoint = saved(linear(), "legacy")
    restored.load_state_dict(checkpoint)
    assert_loaded(restored, checkpoint, "legacy")
    assert not torch.equal(loaded(target)[0], loaded(restored)[0])
    assert wnkernel.accept_any_layout(restored).weights == ["weight"]


# errors are those of our layers; tests/checkpoint/test_errors.py has them all


def bad_checkpoints():
    legacy, parametrized = saved(linear(), "legacy"), saved(linear(), "parametrized")
    g, v = g_and_v()
    return {
        "half legacy": ({**legacy}, "weight_g", 'expected "weight_g" beside "weight_v"'),
        "half parametrized": ({**parametrized}, v, f'expected "{v}" beside "{g}"'),
        "shape": ({**legacy, "weight_v": torch.ones(4, 6)}, None, "size mismatch for weight"),
        "shapes": ({**parametrized, g: torch.ones(1)}, None, "size mismatch for weight"),
        "plain": ({"weight": torch.ones(5, 4)}, None, "size mismatch for weight"),
        "both": ({**legacy, **parametrized}, None, "which differ"),
        "kind": ({**legacy, "weight_v": [1.0]}, None, "got list"),
    }


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize("bad", bad_checkpoints())
@torchs_kinds
def test_errors_leave_the_layer_unchanged(kind, bad, strict):
    checkpoint, missing, message = bad_checkpoints()[bad]
    checkpoint.pop(missing, None)
    checkpoint["bias"] = torch.ones(4)
    target = torchs(linear(), kind)
    wnkernel.accept_any_layout(target)
    g, v = loaded(target)
    before = g.clone(), v.clone()
    with unchanged(checkpoint):
        error = load_error(lambda: target.load_state_dict(checkpoint, strict))
    assert message in error
    assert error.count("\n") == 1
    assert torch.equal(g, before[0])
    assert torch.equal(v, before[1])
    assert torch.equal(target.bias, checkpoint["bias"])


@all_layouts
def test_callers_that_walk_the_modules_with_one_dict(layout):
    target, missing, unexpected, errors = torchs(linear(), "legacy"), [], [], []
    wnkernel.accept_any_layout(target)
    checkpoint = {f"a.{key}": t for key, t in saved(linear(), layout).items()}
    with unchanged(checkpoint):
        target._load_from_state_dict(checkpoint, "a.", {}, True, missing, unexpected, errors)
    assert (missing, unexpected, errors) == ([], [], [])
    assert_loaded(target, {k.removeprefix("a."): t for k, t in checkpoint.items()}, layout)


@pytest.fixture
def _swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("_swapping")
@all_layouts
def test_swapped_parameters(layout):
    checkpoint = saved(linear(), layout)
    with torch.no_grad():  # torch swaps nothing that a graph holds on to
        target = torchs(linear(), "legacy")
    wnkernel.accept_any_layout(target)
    g, v = target.weight_g, target.weight_v
    for assign in (False, True):
        target.load_state_dict(checkpoint, strict=True, assign=assign)
        assert_loaded(target, checkpoint, layout)
        assert target.weight_g is g
        assert target.weight_v is v


@pytest.mark.usefixtures("_swapping")
@all_layouts
def test_what_torch_cannot_swap_is_reported_once(layout):
    target = torchs(linear(), "legacy")
    wnkernel.accept_any_layout(target)
    error = load_error(lambda: target.load_state_dict(saved(linear(), layout)))
    assert error.count('While swapping the parameter named "weight_g"') == 1


@pytest.mark.parametrize("layout", ["legacy", "folded"])
def test_one_weight_is_torchs_and_another_ours(layout):
    """Not the parametrized layout: the parametrizations of the second weight, which torch visits
    later, report those of the first as unexpected."""
    plain, target = nn.LSTM(3, 4), nn.LSTM(3, 4)
    APPLY["legacy"](target, "weight_ih_l0")
    wnkernel.weight_norm(target, "weight_hh_l0")
    names = ("weight_ih_l0", "weight_hh_l0")
    checkpoint = {k: t for k, t in plain.state_dict().items() if k not in names}
    for name in names:
        checkpoint |= {k: t for k, t in saved(plain, layout, name).items() if name in k}
    assert wnkernel.accept_any_layout(target).weights == ["weight_ih_l0"]
    target.load_state_dict(checkpoint, strict=True)
    for name in names:
        assert_loaded(target, checkpoint, layout, name)


def test_what_is_no_module():
    with pytest.raises(TypeError, match=r"^model: expected a torch.nn.Module, got dict"):
        wnkernel.accept_any_layout({})
