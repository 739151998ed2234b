"""Loading into our layers: every key layout, anywhere in a model, with all that torch offers."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import wnkernel
from wnkernel.checkpoint.agreement import same_bits

from .. import reference
from ..checkpoints import (
    LAYOUTS,
    all_layouts,
    assert_loaded,
    expected,
    g_and_v,
    loaded,
    ours,
    saved,
    unchanged,
)
from ..layers import APPLY, LAYERS, all_dims, all_layers, originals


def linear():
    return nn.Linear(5, 4)


def prefixed(checkpoint, prefix):
    return {prefix + key: t for key, t in checkpoint.items()}


@all_dims
@all_layers
@all_layouts
def test_every_layout_loads_into_every_layer(layout, layer, dim):
    build, name, _ = LAYERS[layer]
    checkpoint = saved(build(), layout, name, dim)
    target = ours(build(), name, dim)
    parameters = dict(target.named_parameters())
    with unchanged(checkpoint):
        result = target.load_state_dict(checkpoint, strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_loaded(target, checkpoint, layout, name, dim)
    for key, p in target.named_parameters():
        assert p is parameters[key]  # optimizers hold them
        if key in checkpoint:
            assert torch.equal(p, checkpoint[key])


def test_layouts_mix_in_one_dict():
    plain = [linear() for _ in LAYOUTS]
    checkpoint = {}
    for k, layout in enumerate(LAYOUTS):
        checkpoint |= prefixed(saved(plain[k], layout), f"blocks.{k}.conv.")
    target = nn.ModuleDict(
        {"blocks": nn.ModuleList(nn.ModuleDict({"conv": ours(p)}) for p in plain)}
    )
    with unchanged(checkpoint):
        target.load_state_dict(checkpoint, strict=True)
    for k, layout in enumerate(LAYOUTS):
        assert_loaded(target["blocks"][k]["conv"], saved(plain[k], layout), layout)


@all_layouts
def test_the_prefix_of_a_wrapper_is_no_obstacle(layout):
    plain = linear()
    target = nn.DataParallel(nn.Sequential(ours(plain)))
    target.load_state_dict(prefixed(saved(plain, layout), "module.0."), strict=True)
    assert_loaded(target.module[0], saved(plain, layout), layout)


@pytest.mark.parametrize("rnn", [nn.LSTM, nn.GRU])
def test_each_weight_of_an_rnn_has_its_own_layout(rnn):
    plain = rnn(3, 4, num_layers=2)
    names = ["weight_ih_l0", "weight_hh_l0", "weight_hh_l1"]
    target, checkpoint = copy.deepcopy(plain), {**plain.state_dict()}
    for name, layout in zip(names, LAYOUTS, strict=True):
        wnkernel.weight_norm(target, name)
        del checkpoint[name]
        checkpoint |= {k: t for k, t in saved(plain, layout, name).items() if name in k}
    with torch.no_grad():
        for p in target.parameters():
            p.zero_()
    target.load_state_dict(checkpoint, strict=True)
    for name, layout in zip(names, LAYOUTS, strict=True):
        assert_loaded(target, saved(plain, layout, name), layout, name)
    assert torch.equal(target.weight_ih_l1, plain.weight_ih_l1)


@all_layouts
def test_what_is_missing_or_too_much_is_still_reported(layout):
    plain = linear()
    target = nn.ModuleDict({"here": ours(plain), "gone": ours(plain)})
    checkpoint = {**prefixed(saved(plain, layout), "here."), "here.extra": torch.zeros(1)}
    checkpoint["here.parametrizations.weight.original2"] = torch.zeros(1)
    result = target.load_state_dict(checkpoint, strict=False)
    assert set(result.missing_keys) == {"gone.bias", *g_and_v(prefix="gone.")}
    assert set(result.unexpected_keys) == {
        "here.extra",
        "here.parametrizations.weight.original2",
    }
    assert_loaded(target["here"], saved(plain, layout), layout)
    with pytest.raises(RuntimeError, match=r"here\.extra"):
        target.load_state_dict(checkpoint)


@all_layouts
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_assign_takes_the_tensors_of_the_dict(layout, dtype):
    checkpoint = saved(linear().to(dtype), layout)
    target = ours(linear())
    originals(target)[0].requires_grad_(False)
    with unchanged(checkpoint):
        target.load_state_dict(checkpoint, strict=True, assign=True)
    g, v = originals(target)
    assert_loaded(target, checkpoint, layout)
    assert v.data_ptr() == expected(checkpoint, layout)[1].data_ptr()
    assert g.dtype == v.dtype == target.weight.dtype == dtype
    assert (g.requires_grad, v.requires_grad) == (False, True)
    assert all(isinstance(p, nn.Parameter) for p in (g, v))


@all_layouts
def test_models_on_the_meta_device_load_by_assign(layout):
    plain = linear()
    checkpoint = saved(plain, layout)
    with torch.device("meta"):
        target = wnkernel.weight_norm(linear())
    target.load_state_dict(checkpoint, strict=True, assign=True)
    assert_loaded(target, checkpoint, layout)
    assert torch.equal(target.weight, ours_with(plain, checkpoint).weight)


def ours_with(plain, checkpoint):
    layer = ours(plain)
    layer.load_state_dict(checkpoint)
    return layer


@all_layouts
def test_values_are_cast_to_the_dtype_of_the_model(layout):
    checkpoint = saved(linear(), layout)
    target = ours(linear()).to(torch.bfloat16)
    target.load_state_dict(checkpoint, strict=True)
    g, v = loaded(target)
    assert g.dtype == v.dtype == torch.bfloat16
    if layout == "folded":
        rounded = checkpoint["weight"].bfloat16()
        assert torch.equal(v, rounded)
        assert torch.equal(g, reference.norm(rounded, 0).bfloat16())
    else:
        assert torch.equal(g, expected(checkpoint, layout)[0].bfloat16())


def test_the_norms_of_a_plain_weight_are_as_precise_as_g():
    target = ours(linear())
    originals(target)[1].data = originals(target)[1].data.bfloat16()
    weight = linear().weight.detach()
    target.load_state_dict({"weight": weight, "bias": torch.zeros(4)}, strict=True)
    g, v = loaded(target)
    assert g.dtype == torch.float32
    assert v.dtype == torch.bfloat16
    torch.testing.assert_close(g, reference.norm(weight.bfloat16(), 0).float(), rtol=3e-7, atol=0)


def test_one_element_loads_into_a_scalar_as_in_torch():
    """torch 0.3 had no 0-dimensional tensors."""
    target = ours(linear(), dim=None)
    checkpoint = saved(linear(), "legacy", dim=None)
    checkpoint["weight_g"] = checkpoint["weight_g"].reshape(1)
    target.load_state_dict(checkpoint, strict=True)
    assert torch.equal(loaded(target)[0], checkpoint["weight_g"][0])


def test_a_scalar_loads_into_one_element():
    """Into what torch 0.3 saved, then."""
    target, checkpoint = ours(linear(), dim=None), saved(linear(), "legacy", dim=None)
    weights = target.parametrizations.weight
    weights.original0 = nn.Parameter(weights.original0.detach().reshape(1))
    target.load_state_dict(checkpoint, strict=True)
    assert torch.equal(weights.original0, checkpoint["weight_g"].reshape(1))


@pytest.mark.parametrize("assign", [False, True])
def test_a_v_that_is_normed_itself_can_be_trained_after_loading(assign):
    target = ours(linear())
    wnkernel.weight_norm(target.parametrizations.weight, "original1")
    checkpoint = {"weight": torch.randn(4, 5), "bias": torch.zeros(4)}
    with torch.inference_mode():
        target.load_state_dict(checkpoint, strict=True, assign=assign)
    torch.testing.assert_close(target.weight, checkpoint["weight"])
    inner = target.parametrizations.weight.parametrizations.original1
    assert not any(p.is_inference() for p in (inner.original0, inner.original1))


@all_layouts
def test_parameters_swapped_by_torch_keep_their_identity(layout):
    target, checkpoint = ours(linear()), saved(linear(), layout)
    before = originals(target)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for assign in (False, True):
            target.load_state_dict(checkpoint, strict=True, assign=assign)
            assert all(p is q for p, q in zip(originals(target), before, strict=True))
            assert_loaded(target, checkpoint, layout)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@all_layouts
def test_keys_of_parametrizations_on_top_load_as_ever(layout):
    target = spectral_norm(ours(linear()))
    other = spectral_norm(ours(linear())).state_dict()
    checkpoint = saved(linear(), layout)
    on_top = {k: t + 1 for k, t in other.items() if ".weight.1." in k}
    assert on_top
    result = target.load_state_dict(checkpoint, strict=False)
    assert set(result.missing_keys) == set(on_top)
    target.load_state_dict(checkpoint | on_top, strict=True)
    assert_loaded(target, checkpoint, layout)
    for key, t in on_top.items():
        assert torch.equal(target.state_dict()[key], t)


@all_layouts
def test_a_layer_in_two_places_loads_from_either(layout):
    shared, checkpoint = ours(linear()), saved(linear(), layout)
    target = nn.ModuleDict({"encoder": shared, "decoder": shared})
    both = prefixed(checkpoint, "encoder.") | prefixed(checkpoint, "decoder.")
    target.load_state_dict(both, strict=True)
    assert_loaded(shared, checkpoint, layout)
    other = prefixed(saved(linear(), layout), "decoder.")
    missing = target.load_state_dict(other, strict=False).missing_keys
    assert set(missing) == {"encoder.bias", *g_and_v(prefix="encoder.")}
    assert_loaded(shared, {k.removeprefix("decoder."): t for k, t in other.items()}, layout)


def test_a_parameter_that_is_called_like_a_legacy_one_is_itself():
    target = ours(linear())
    target.register_parameter("weight_g", nn.Parameter(torch.zeros(3)))
    checkpoint = {**saved(linear(), "parametrized"), "weight_g": torch.ones(3)}
    target.load_state_dict(checkpoint, strict=True)
    assert torch.equal(target.weight_g, torch.ones(3))
    assert_loaded(target, checkpoint, "parametrized")


@all_layouts
def test_callers_that_walk_the_modules_with_one_dict(layout):
    """As mmcv does, and as transformers 4 did, which left out modules without keys; here with the
    caller's own dict."""
    plain = linear()
    checkpoint = prefixed(saved(plain, layout), "a.b.")

    def walk(module, prefix, skip):
        lists = ([], [], []) if skip else (missing, unexpected, errors)
        if not skip or any(key.startswith(prefix) for key in checkpoint):
            module._load_from_state_dict(checkpoint, prefix, {}, True, *lists)
        for name, child in module._modules.items():
            walk(child, f"{prefix}{name}.", skip)

    for skip in (False, True):
        missing, unexpected, errors = [], [], []
        target = nn.ModuleDict({"a": nn.ModuleDict({"b": ours(plain)})})
        with unchanged(checkpoint):
            walk(target, "", skip)
        assert (missing, unexpected, errors) == ([], [], [])
        assert_loaded(target["a"]["b"], saved(plain, layout), layout)


@all_layouts
def test_a_layer_that_is_called_directly_leaves_the_dict_alone(layout):
    checkpoint, target = saved(linear(), layout), ours(linear())
    with unchanged(checkpoint):
        target._load_from_state_dict(checkpoint, "", {}, True, [], [], [])
    assert_loaded(target, checkpoint, layout)
    # What the call left behind means nothing to others.
    assert set(target.load_state_dict({}, strict=False).missing_keys) == {"bias", *g_and_v()}


def test_a_list_of_parametrizations_loads_on_its_own():
    target, checkpoint = ours(linear()), saved(linear(), "parametrized")
    below = {
        key.removeprefix("parametrizations."): t
        for key, t in checkpoint.items()
        if key.startswith("parametrizations.")
    }
    target.parametrizations.load_state_dict(below, strict=True)
    assert_loaded(target, checkpoint, "parametrized")
    result = target.parametrizations.load_state_dict({}, strict=False)
    assert set(result.missing_keys) == {"weight.original0", "weight.original1"}


@pytest.mark.parametrize("name", ["original0", "original1"])
@all_layouts
def test_what_is_no_parameter_is_left_to_torch(layout, name):
    """FSDP puts views of a flat parameter in its place."""

    def flattened(layer):
        weights = layer.parametrizations.weight
        view = getattr(weights, name).detach()
        del weights._parameters[name]
        setattr(weights, name, view)
        return layer

    layers = flattened(ours(linear())), flattened(APPLY["torch"](linear()))
    for layer in layers:
        layer._load_state_dict_pre_hooks = layers[0]._load_state_dict_pre_hooks
    checkpoint = saved(linear(), layout)
    got, want = (layer.load_state_dict(checkpoint, strict=False) for layer in layers)
    assert got == want


@all_layouts
def test_copies_load_alone(layout):
    first = ours(linear())
    twin, checkpoint = copy.deepcopy(first), saved(linear(), layout)
    before = copy.deepcopy(first.state_dict())
    twin.load_state_dict(checkpoint, strict=True)
    assert_loaded(twin, checkpoint, layout)
    for key, t in first.state_dict().items():
        assert torch.equal(t, before[key])


@all_layouts
def test_metadata_of_the_dict_is_kept(layout):
    plain = linear()
    checkpoint = OrderedDict(saved(plain, layout))
    checkpoint._metadata = OrderedDict({"": {"version": 1}})
    ours(plain).load_state_dict(checkpoint, strict=True)
    assert checkpoint._metadata == {"": {"version": 1}}


@all_layouts
def test_fused_layers_compute_from_what_was_loaded(layout):
    plain, other = linear(), nn.Linear(4, 3)
    model = nn.Sequential(ours(plain), ours(other))
    wnkernel.fuse(model, reuse="version")
    x = torch.ones(2, 5)
    model(x)
    checkpoint = prefixed(saved(plain, layout), "0.") | prefixed(saved(other, layout), "1.")
    model.load_state_dict(checkpoint, strict=True)
    alone = nn.Sequential(ours(plain), ours(other))
    alone.load_state_dict(checkpoint, strict=True)
    assert torch.equal(model(x), alone(x))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32, torch.float64])
def test_same_bits_of_every_size(dtype: torch.dtype) -> None:
    a = torch.arange(6).to(dtype)
    b = a.clone()
    assert same_bits(a, b)
    b[3] += 1
    assert not same_bits(a, b)
