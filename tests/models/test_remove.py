"""``remove_weight_norm`` and torch's ``remove_parametrizations``: the way back to a plain layer."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import wnkernel

from ..layers import APPLY, LAYERS, all_dims, all_kinds, all_layers, legacy_weight_norm, run, twins


def assert_plain(module: nn.Module, like: nn.Module, name: str = "weight") -> None:
    """No class, parameter, buffer or hook is left over."""
    assert type(module) is type(like)
    assert not parametrize.is_parametrized(module)
    assert isinstance(getattr(module, name), nn.Parameter)
    assert set(module.state_dict()) == set(like.state_dict())
    assert set(dict(module.named_parameters())) == set(dict(like.named_parameters()))
    assert not list(module.named_buffers())
    assert not module._forward_pre_hooks
    assert not module._load_state_dict_pre_hooks
    assert not module._state_dict_hooks
    assert vars(module).keys() == vars(like).keys()


@all_dims
@all_layers
@all_kinds
def test_same_output_bit_for_bit(backend, kind, layer, dim):
    (module,) = twins(layer, dim, kind)
    build, name, _ = LAYERS[layer]
    before = run(module, layer)
    assert wnkernel.remove_weight_norm(module, name) is module
    assert torch.equal(run(module, layer), before)
    assert_plain(module, build(), name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@all_kinds
def test_dtype_is_kept(route, kind, dtype):
    module = APPLY[kind](nn.Linear(5, 4)).to(dtype)
    before = run(module, "Linear", dtype)
    wnkernel.remove_weight_norm(module)
    assert module.weight.dtype == dtype
    assert torch.equal(run(module, "Linear", dtype), before)


@pytest.mark.parametrize("trainable", ["neither", "g", "v", "both"])
@all_kinds
def test_requires_grad_is_kept(route, kind, trainable):
    module = APPLY[kind](nn.Linear(5, 4))
    g, v = (
        (module.weight_g, module.weight_v)
        if kind == "legacy"
        else (module.parametrizations.weight.original0, module.parametrizations.weight.original1)
    )
    g.requires_grad_(trainable in ("g", "both"))
    v.requires_grad_(trainable in ("v", "both"))
    wnkernel.remove_weight_norm(module)
    assert_plain(module, nn.Linear(5, 4))
    assert module.weight.requires_grad == (trainable != "neither")
    assert module.weight.is_leaf


@all_kinds
def test_memory_format_is_kept(kind):
    module = APPLY[kind](nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last))
    wnkernel.remove_weight_norm(module)
    if kind == "ours":
        assert module.weight.is_contiguous(memory_format=torch.channels_last)
    assert_plain(module, nn.Conv2d(4, 6, 3))


@all_kinds
def test_other_parameters_stay_normed(route, kind):
    module = nn.LSTM(4, 5)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        APPLY[kind](module, name)
    before = run(module, "LSTM ih")
    wnkernel.remove_weight_norm(module, "weight_ih_l0")
    assert "weight_ih_l0" in module.state_dict()
    assert "weight_hh_l0" not in module.state_dict()
    assert torch.equal(run(module, "LSTM ih"), before)
    source = legacy_weight_norm(nn.LSTM(4, 5), "weight_hh_l0")
    if kind != "legacy":  # the load hook of the other parameter is still there
        module.load_state_dict(source.state_dict(), strict=True)
    wnkernel.remove_weight_norm(module, "weight_hh_l0")
    assert_plain(module, nn.LSTM(4, 5), "weight_hh_l0")


@all_kinds
def test_apply_after_remove(route, kind):
    module = APPLY[kind](nn.Linear(5, 4))
    before = module.weight.detach().clone()
    wnkernel.remove_weight_norm(module)
    wnkernel.weight_norm(module)
    torch.testing.assert_close(module.weight, before)
    run(module, "Linear").sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_torchs_remove_parametrizations(route):
    module = wnkernel.weight_norm(nn.Linear(5, 4))
    w = module.weight.detach().clone()
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    assert type(module) is nn.Linear
    assert isinstance(module.weight, nn.Parameter)
    assert torch.equal(module.weight, w)
    assert set(module.state_dict()) == {"weight", "bias"}


def test_stacked_parametrizations_fold_with_torchs_tool(route):
    module = wnkernel.weight_norm(nn.Linear(5, 4))
    nn.utils.parametrizations.spectral_norm(module)
    module.eval()
    w = module.weight.detach().clone()
    parametrize.remove_parametrizations(module, "weight")
    assert torch.equal(module.weight, w)
    assert type(module) is nn.Linear


def test_a_deep_copy_keeps_its_weight_norm():
    """Copies share the class that parametrize made; a removal must not reach the others."""
    original = wnkernel.weight_norm(torch.nn.Conv1d(4, 6, 3))
    copy = deepcopy(original)
    w = original.weight.clone()
    wnkernel.remove_weight_norm(copy)
    assert torch.equal(original.weight, w)
    assert torch.equal(copy.weight, w)
    wnkernel.remove_weight_norm(original)
    assert type(original) is type(copy) is torch.nn.Conv1d
