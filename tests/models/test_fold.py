"""``wnkernel.fold``: a whole model back to plain weights, whatever its weight norms."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm

import wnkernel

from .. import small_models
from ..groups import LAYERS as NET
from ..groups import Computed, Net, assert_same, both_modes, twins
from ..layers import APPLY, LAYERS, all_kinds, all_layers, legacy_weight_norm, run
from ..small_models import MODELS, all_models
from .test_remove import assert_plain


def assert_folded(model: nn.Module) -> None:
    """Nothing of a weight norm is left anywhere in a model."""
    for module in model.modules():
        assert not parametrize.is_parametrized(module)
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        assert not module._load_state_dict_pre_hooks
        assert not any("weight_norm" in name for name in vars(module))
        assert not {"weight_g", "weight_v"} & module._parameters.keys()
        assert all(p.is_leaf for p in module.parameters(recurse=False))


def third_party(kind: str, name: str) -> nn.Module:
    if kind != "ours":
        return small_models.build(name, kind)
    model = small_models.build(name, "torch")
    wnkernel.convert(model)
    return model


@all_kinds
@all_models
def test_third_party_models_keep_their_bits(route, kind, name):
    model = third_party(kind, name)
    before = small_models.run(model, name).detach()
    names = wnkernel.fold(model)
    assert len(names) == len(set(names)) == MODELS[name].layers
    assert_folded(model)
    assert set(names) <= set(dict(model.named_parameters()))
    assert torch.equal(small_models.run(model, name), before)
    assert wnkernel.fold(model) == []
    assert torch.equal(small_models.run(model, name), before)


@all_layers
@all_kinds
def test_a_layer_is_as_before_its_weight_norm(kind, layer):
    build, name, _ = LAYERS[layer]
    module = APPLY[kind](build(), name)
    before = run(module, layer)
    assert wnkernel.fold(module) == [name]
    assert torch.equal(run(module, layer), before)
    assert_plain(module, build(), name)


def test_all_kinds_in_one_model():
    shared = wnkernel.weight_norm(nn.Linear(3, 3))
    model = nn.ModuleDict(
        {
            "a": nn.Sequential(shared, legacy_weight_norm(nn.Linear(3, 3)), shared),
            "b": APPLY["torch"](nn.Linear(3, 3)),
            "c": shared,
            "d": spectral_norm(nn.Linear(3, 3)),
            "e": nn.Linear(3, 3),
        }
    )
    parametrize.register_parametrization(model["b"], "bias", nn.Identity())
    assert wnkernel.fold(model) == ["a.0.weight", "a.1.weight", "b.weight"]
    assert model["a"][2] is model["c"] is shared
    assert list(model["b"].parametrizations) == ["bias"]
    assert parametrize.is_parametrized(model["d"], "weight")
    assert wnkernel.fold(model) == []
    with pytest.raises(TypeError, match=r"^model: expected a torch.nn.Module, got NoneType"):
        wnkernel.fold(None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("trainable", ["neither", "g", "v"])
@all_kinds
def test_dtype_memory_format_and_requires_grad(kind, trainable, dtype):
    module = APPLY[kind](nn.Conv2d(4, 6, 3)).to(dtype)
    module.to(memory_format=torch.channels_last)
    ends = {"neither": (), "g": ("original0", "_g"), "v": ("original1", "_v")}[trainable]
    for key, p in module.named_parameters():
        p.requires_grad_(key.endswith(ends))
    with torch.no_grad():
        module(torch.zeros(1, 4, 3, 3, dtype=dtype))
    before = module.weight
    wnkernel.fold(module)
    assert module.weight.dtype == dtype
    assert module.weight.stride() == before.stride()
    assert torch.equal(module.weight, before)
    assert module.weight.requires_grad == (trainable != "neither")
    assert not module.bias.requires_grad
    assert "weight" in module._parameters


def test_a_buffer_for_g():
    module = legacy_weight_norm(nn.Linear(5, 4))
    module.register_buffer("weight_g", 2 * module._parameters.pop("weight_g").detach())
    before = run(module, "Linear")
    wnkernel.fold(module)
    assert torch.equal(run(module, "Linear"), before)
    assert_plain(module, nn.Linear(5, 4))


# Stacked parametrizations


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["ours", "torch"])
def test_a_stack_is_folded_as_it_is_in_eval_mode(kind, training):
    """In train mode spectral norm would iterate once more."""
    module = spectral_norm(APPLY[kind](nn.Linear(5, 4)))
    module.eval()
    before = run(module, "Linear")
    module.train(training)
    assert wnkernel.fold(module) == ["weight"]
    assert torch.equal(run(module, "Linear"), before)
    assert module.training == training
    assert_plain(module, nn.Linear(5, 4))


@pytest.mark.parametrize("last", ["stack", "hook"])
def test_a_weight_that_cannot_be_computed_changes_nothing(last):
    def fail(*_) -> torch.Tensor:
        raise RuntimeError("not today")

    model, top = nn.Sequential(*(apply(nn.Linear(3, 3)) for apply in APPLY.values())), nn.Identity()
    parametrize.register_parametrization(model[1], "weight", top)
    top.eval()
    (hook,) = model[2]._forward_pre_hooks.values()
    wnkernel.fuse(model)
    spoiled, method = (top, "forward") if last == "stack" else (hook, "compute_weight")
    setattr(spoiled, method, fail)
    before = [(type(m), vars(m).copy(), m.training) for m in model.modules()]
    with pytest.raises(RuntimeError, match="not today"):
        wnkernel.fold(model)
    assert [(type(m), vars(m), m.training) for m in model.modules()] == before
    delattr(spoiled, method)
    x = torch.randn(2, 3)
    y = model(x)
    assert len(wnkernel.fold(model)) == 3
    assert torch.equal(model(x), y)


class OnlyInEvalMode(nn.Module):
    def forward(self, w: torch.Tensor) -> torch.Tensor:
        if self.training:
            raise RuntimeError("not in train mode")
        return 2 * w


def test_a_stack_is_never_computed_in_train_mode():
    module = wnkernel.weight_norm(nn.Linear(3, 3))
    w = 2 * module.weight
    parametrize.register_parametrization(module, "weight", OnlyInEvalMode(), unsafe=True)
    wnkernel.fold(module)
    assert torch.equal(module.weight, w)


# Groups


@both_modes
def test_a_fused_model(computed: Computed, reuse):
    model, twin, group = twins(reuse)
    model().sum().backward()
    assert wnkernel.fold(model) == [f"{name}.weight" for name in NET]
    assert_folded(model)
    assert group.memory()["slots"] == 0
    assert group.layers == []
    computed.take()
    assert torch.equal(model(), twin())
    assert computed.take() == ([], 7)  # the twin's
    copy.deepcopy(model)
    with pytest.raises(ValueError, match="expected layers with"):
        wnkernel.fuse(model)


@both_modes
def test_a_part_of_a_fused_model(computed: Computed, reuse):
    model, twin, group = twins(reuse)
    model()
    assert wnkernel.fold(model.front) == ["conv.weight", "up.weight", "wide.weight"]
    assert_folded(model.front)
    assert group.layers == [f"{name}.weight" for name in NET[3:]]
    group.refresh()
    computed.take()
    y = model()
    assert computed.take() == ([4], 0)
    assert torch.equal(y, twin())


@pytest.mark.parametrize("remove", [wnkernel.fold, wnkernel.remove_weight_norm])
def test_a_weight_within_a_scope_is_none_of_its_slots(remove):
    """Whoever read one has it, and it stays as it is."""
    model, twin, group = twins()
    weights = model.head.parametrizations.weight  # outlives its layer's weight norm
    with torch.no_grad(), group.scope():
        read = model.head.weight
        before = read.clone()
        remove(model.head)
        assert torch.equal(model(), twin())
        model.head.weight.zero_()
        assert torch.equal(read, before)
    assert weights.owner is None
    assert "head.weight" not in group.layers


def test_a_group_within_the_model():
    inner = Net()
    model = nn.Sequential(inner, wnkernel.weight_norm(nn.Linear(3, 3)))
    wnkernel.fuse(inner)
    with torch.no_grad():
        before = inner()
    assert len(wnkernel.fold(model)) == 8
    assert_folded(model)
    assert_same(inner().detach(), before)


def test_within_a_scope():
    model, twin, group = twins("forward")
    with group.scope():
        model()
        wnkernel.fold(model)
        assert torch.equal(model(), twin())
    assert torch.equal(model(), twin())


# What the plain weights share and hold


def tied(kind: str, **options) -> nn.Sequential:
    """Three layers of one v, the first two of one g."""
    model = nn.Sequential(*(APPLY[kind](nn.Linear(4, 4), **options) for _ in range(3)))
    names = ("weight_g", "weight_v") if kind == "legacy" else ("original0", "original1")
    first, *others = (m if kind == "legacy" else m.parametrizations.weight for m in model)
    for name, holders in zip(names, (others[:1], others), strict=True):
        for holder in holders:
            setattr(holder, name, getattr(first, name))
    with torch.no_grad():
        getattr(others[1], names[0]).mul_(2)
    return model


@all_kinds
def test_tied_weights_stay_tied(kind):
    """Those of one g and one v, and no others."""
    model = tied(kind)
    x = torch.randn(2, 4)
    y = model(x)
    assert len(wnkernel.fold(model)) == 3
    assert model[0].weight is model[1].weight
    assert model[2].weight is not model[0].weight
    assert torch.equal(model(x), y)


def test_the_same_v_with_another_dim_or_eps_is_not_tied():
    model = tied("ours", dim=None)
    model[1].parametrizations.weight[0].eps = 100.0
    assert len(wnkernel.fold(model)) == 3
    assert not torch.equal(model[0].weight, model[1].weight)


@all_kinds
def test_nothing_of_g_and_v_is_kept(kind):
    model = nn.Sequential(*(APPLY[kind](nn.Linear(200, 200)) for _ in range(2)))
    model(torch.ones(1, 200)).sum().backward()
    held = [weakref.ref(p) for p in model.parameters() if p.ndim == 2]
    wnkernel.fold(model)
    gc.collect()
    assert [ref() for ref in held] == [None] * 4
    file = io.BytesIO()
    torch.save(model[0].weight, file)
    assert len(file.getvalue()) < 4 * 200 * 200 + 4096  # and not more than the weight


@all_kinds
def test_parameters_come_as_torch_leaves_them(kind):
    """The plain weight comes last in its layer; keys and checkpoints are those of a plain layer."""
    module = APPLY[kind](nn.Linear(5, 4))
    wnkernel.fold(module)
    assert list(module.state_dict()) == ["bias", "weight"]
    plain = nn.Linear(5, 4)
    module.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(run(module, "Linear"), run(plain, "Linear"))


def test_copies_keep_their_weight_norm():
    model = nn.Sequential(APPLY["torch"](nn.Linear(4, 4)), wnkernel.weight_norm(nn.Linear(4, 4)))
    twin = copy.deepcopy(model)
    x = torch.randn(2, 4)
    y = twin(x)
    wnkernel.fold(model)
    assert torch.equal(twin(x), y)
    assert all(parametrize.is_parametrized(layer) for layer in twin)
    assert wnkernel.fold(twin) == ["0.weight", "1.weight"]


def test_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(*(apply(nn.Conv1d(4, 6, 3)) for apply in APPLY.values()))
    assert len(wnkernel.fold(model)) == 3
    assert_folded(model)
    assert all(layer.weight.is_meta for layer in model)


def test_other_parametrizations_do_not_become_weights():
    """Without a weight norm beneath, a parametrization is nobody's business here."""
    model = nn.Sequential(orthogonal(nn.Linear(4, 4)))
    assert wnkernel.fold(model) == []
    assert parametrize.is_parametrized(model[0])


@all_kinds
def test_an_rnn_trains_on(kind):
    module = APPLY[kind](APPLY[kind](nn.LSTM(3, 4), "weight_ih_l0"), "weight_hh_l0")
    x = torch.randn(2, 1, 3)
    before = module(x)[0]
    assert set(wnkernel.fold(module)) == {"weight_ih_l0", "weight_hh_l0"}
    assert torch.equal(module(x)[0], before)
    for name, w in zip(module._flat_weights_names, module._flat_weights, strict=True):
        assert w is module._parameters[name]
    module(x)[0].sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    assert torch.equal(copy.deepcopy(module)(x)[0], before)
