"""``wnkernel.convert`` on layers: torch's two kinds become ours and nothing else changes."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

import wnkernel
from wnkernel.census import OURS, TORCH, TORCH_HOOK
from wnkernel.parametrization import WeightNormList

from .. import reference
from ..layers import (
    APPLY,
    LAYERS,
    all_dims,
    all_layers,
    assert_same_state,
    legacy_weight_norm,
    originals,
    run,
    twins,
    weight_norm_kinds,
)

torchs_kinds = pytest.mark.parametrize("kind", ["torch", "legacy"])


def g_and_v(module: nn.Module, kind: str, name: str = "weight") -> tuple[Tensor, Tensor]:
    if kind == "legacy":
        return getattr(module, f"{name}_g"), getattr(module, f"{name}_v")
    return originals(module, name)


def move_g(module: nn.Module, kind: str, name: str = "weight") -> None:
    """Off the norms of v, or ``w = v`` would do."""
    g, _ = g_and_v(module, kind, name)
    with torch.no_grad():
        g.mul_(0.5 + torch.rand(g.shape))


def backward(module: nn.Module, layer: str) -> list[Tensor]:
    """The output and the gradients of all parameters, in their order."""
    module.zero_grad()
    y = run(module, layer)
    y.square().sum().backward()
    return [y, *(p.grad for p in module.parameters())]


def assert_same_bits(got: list[Tensor], want: list[Tensor]) -> None:
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a, b), k


@all_dims
@all_layers
@torchs_kinds
def test_a_layer_becomes_ours(kind, layer, dim):
    module, twin, fresh = twins(layer, dim, kind, kind, "ours")
    name = LAYERS[layer][1]
    for m in (module, twin):
        torch.manual_seed(1)
        move_g(m, kind, name)
    g, v = g_and_v(module, kind, name)
    before = list(module.parameters())
    run(module, layer)  # leaves a weight behind on a legacy layer
    assert wnkernel.convert(module) == [name]
    assert weight_norm_kinds(module) == {name: OURS}
    assert type(module.parametrizations[name]) is WeightNormList
    assert originals(module, name)[0] is g
    assert originals(module, name)[1] is v
    assert [id(p) for p in module.parameters()] == [id(p) for p in before]
    assert list(module.state_dict()) == list(fresh.state_dict())
    assert not module._forward_pre_hooks
    assert vars(module).keys() == vars(fresh).keys()
    reference.assert_close("w", getattr(module, name), reference.forward(v, g, dim))
    with wnkernel.use_backend("eager"):
        got, want = backward(module, layer), backward(twin, layer)
    if dim in (0, v.ndim - 1):  # torch's kernels, in torch and on this backend
        assert_same_bits(got, want)
    torch.testing.assert_close(got, want)


@torchs_kinds
def test_a_second_call_changes_nothing(kind):
    module = APPLY[kind](nn.Conv1d(4, 6, 3))
    wnkernel.convert(module)
    before = type(module), dict(vars(module)), vars(module.parametrizations.weight).copy()
    assert wnkernel.convert(module) == []
    assert before == (type(module), vars(module), vars(module.parametrizations.weight))


def test_names_are_those_of_the_model():
    shared = legacy_weight_norm(nn.Linear(3, 3))
    rnn = nn.LSTM(3, 3)
    APPLY["torch"](rnn, "weight_ih_l0"), APPLY["legacy"](nn.Linear(2, 2))
    legacy_weight_norm(rnn, "weight_hh_l0")
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(3, 3),
            "ours": wnkernel.weight_norm(nn.Linear(3, 3)),
            "stack": nn.Sequential(shared, nn.ReLU(), shared, APPLY["torch"](nn.Linear(3, 2))),
            "again": shared,
            "rnn": rnn,
        }
    )
    names = ["stack.0.weight", "stack.3.weight", "rnn.weight_hh_l0", "rnn.weight_ih_l0"]
    assert wnkernel.convert(model) == names
    assert model["stack"][0] is model["stack"][2] is model["again"] is shared
    wrapped = nn.DataParallel(nn.Sequential(APPLY["torch"](nn.Linear(3, 2))))
    assert wnkernel.convert(wrapped) == ["module.0.weight"]
    assert wnkernel.convert(nn.Linear(3, 2)) == []
    with pytest.raises(TypeError, match=r"^model: expected a torch.nn.Module, got OrderedDict"):
        wnkernel.convert(model.state_dict())


# Order


class Mixed(nn.Module):
    """A weight-normed parameter of its own, before a child."""

    def __init__(self, apply) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(4))
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.child = apply(nn.Linear(4, 2))
        apply(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.child(nn.functional.linear(x, self.weight, self.bias))


@torchs_kinds
def test_parameters_keep_their_order(kind):
    """So that an optimizer's state_dict, which goes by position, still fits."""
    model = Mixed(APPLY[kind])
    before = [id(p) for p in model.parameters()]
    wnkernel.convert(model)
    assert [id(p) for p in model.parameters()] == before


@pytest.mark.parametrize("other", ["ours", "torch", None])
def test_parameters_keep_their_order_beside_parametrizations(other):
    """Those were submodules before, and are behind all that was the layer's own."""
    module, names = nn.LSTM(4, 4), ["weight_hh_l0", "weight_ih_l0"]
    if other:
        APPLY[other](module, names.pop())
    parametrize.register_parametrization(module, "bias_hh_l0", nn.Identity())
    for name in names:
        legacy_weight_norm(module, name)
    before = [id(p) for p in module.parameters()]
    assert set(wnkernel.convert(module)) >= set(names)
    assert [id(p) for p in module.parameters()] == before


def test_a_later_parameter_comes_before_g_and_v():
    """Where the order cannot be kept: own parameters come before those of submodules."""
    module = legacy_weight_norm(nn.Linear(3, 4))
    module.scale = nn.Parameter(torch.ones(4))
    bias, g, v, scale = module.parameters()
    wnkernel.convert(module)
    assert [id(p) for p in module.parameters()] == [id(p) for p in (bias, scale, g, v)]


# What has to survive


@torchs_kinds
def test_gradients_flags_and_hooks_stay(kind):
    module = APPLY[kind](nn.Linear(5, 4)).eval()
    g, v = g_and_v(module, kind)
    g.requires_grad_(False)
    run(module, "Linear").sum().backward()
    grad, calls = v.grad, []
    v.register_hook(lambda _: calls.append("v"))
    module.register_forward_pre_hook(lambda *_: calls.append("before"))
    if kind == "torch":
        module.parametrizations.weight[0].register_forward_hook(lambda *_: calls.append("norm"))
    wnkernel.convert(module)
    assert v.grad is grad
    assert not any(m.training for m in module.modules())
    run(module, "Linear").sum().backward()
    assert calls == ["before", *(["norm"] if kind == "torch" else []), "v"]
    assert g.grad is None


@pytest.mark.parametrize("persistent", [True, False])
def test_a_buffer_for_g(persistent):
    module = legacy_weight_norm(nn.Linear(5, 4))
    g = module._parameters.pop("weight_g").detach() * 2
    module.register_buffer("weight_g", g, persistent)
    twin = copy.deepcopy(module.state_dict())
    y = run(module, "Linear")
    assert wnkernel.convert(module) == ["weight"]
    assert module.parametrizations.weight.original0 is g
    assert dict(module.named_buffers()).keys() == {"parametrizations.weight.original0"}
    assert len(module.state_dict()) == len(twin)
    assert not module._non_persistent_buffers_set
    with wnkernel.use_backend("eager"):
        assert torch.equal(run(module, "Linear"), y)
    assert wnkernel.fold(module) == ["weight"]
    assert not list(module.buffers())


def test_legacy_names_answer_after_conversion():
    """The code of the model was written for them."""
    module = legacy_weight_norm(nn.Linear(5, 4))
    g = module.weight_g
    wnkernel.convert(module)
    assert module.weight_g is g
    module.weight_v = new = nn.Parameter(torch.randn(4, 5))
    assert originals(module)[1] is module.weight_v is new
    assert list(module.state_dict())[1:] == [
        "parametrizations.weight.original0",
        "parametrizations.weight.original1",
    ]
    wnkernel.remove_weight_norm(module)
    assert not hasattr(module, "weight_g")


# Stacked parametrizations


@pytest.mark.parametrize("training", [True, False])
def test_spectral_norm_on_top_stays_there(training):
    module = APPLY["torch"](nn.Linear(5, 4))
    move_g(module, "torch")
    spectral_norm(module)
    module.train(training)
    twin = copy.deepcopy(module)
    top = module.parametrizations.weight[1]
    assert wnkernel.convert(module) == ["weight"]
    assert list(module.parametrizations.weight)[1] is top
    assert type(module.parametrizations.weight[0]) is wnkernel.WeightNorm
    assert_same_state(module.state_dict(), twin.state_dict())
    with wnkernel.use_backend("eager"):
        for _ in range(2):
            assert_same_bits(backward(module, "Linear"), backward(twin, "Linear"))
    assert_same_state(module.state_dict(), twin.state_dict())


def test_other_parametrizations_are_left_alone():
    model = nn.Sequential(spectral_norm(nn.Linear(3, 3)), legacy_weight_norm(nn.Linear(3, 3)))
    parametrize.register_parametrization(model[1], "bias", nn.Identity())
    wnkernel.convert(model)
    assert set(model[1].parametrizations) == {"bias", "weight"}
    assert not isinstance(model[0].parametrizations.weight, WeightNormList)
    model(torch.randn(2, 3)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# Copies, saving, compiling, fusing


def test_deep_copies_that_share_a_class():
    first = APPLY["torch"](nn.Linear(5, 4))
    second, third = copy.deepcopy(first), copy.deepcopy(first)
    assert type(first) is type(second)
    wnkernel.convert(second)
    assert weight_norm_kinds(first) == {"weight": TORCH}
    assert wnkernel.remove_weight_norm(second).weight.is_leaf
    torch.testing.assert_close(first.weight, second.weight)
    wnkernel.convert(first)
    assert weight_norm_kinds(third) == {"weight": TORCH}
    w = first.weight
    parametrize.remove_parametrizations(third, "weight")  # takes a property from its class
    assert torch.equal(first.weight, w)


def test_a_second_parameter_leaves_deep_copies_alone():
    first = wnkernel.weight_norm(nn.LSTM(4, 5), "weight_hh_l0")
    second = legacy_weight_norm(copy.deepcopy(first), "weight_ih_l0")
    y = run(first, "LSTM ih")
    wnkernel.convert(second)
    assert torch.equal(run(first, "LSTM ih"), y)
    wnkernel.weight_norm(copy.deepcopy(first), "weight_ih_l0")
    assert torch.equal(run(first, "LSTM ih"), y)


@torchs_kinds
def test_converted_layers_can_be_copied(kind):
    """torch's legacy hook leaves a weight with a history behind, which cannot."""
    module = APPLY[kind](nn.Linear(5, 4))
    run(module, "Linear")
    wnkernel.convert(module)
    run(module, "Linear").sum().backward()
    twin = copy.deepcopy(module)
    assert torch.equal(run(twin, "Linear"), run(module, "Linear"))
    assert originals(twin)[0] is not originals(module)[0]


@torchs_kinds
def test_saving(kind):
    module = APPLY[kind](nn.Linear(5, 4))
    if kind == "legacy":  # can be pickled whole; what comes back converts
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        module = torch.load(file, weights_only=False)
    wnkernel.convert(module)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    torchs = APPLY["torch"](nn.Linear(5, 4))
    torchs.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert_same_state(torchs.state_dict(), module.state_dict())
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert_same_state(loaded.state_dict(), module.state_dict())
    assert torch.equal(run(loaded, "Linear"), run(module, "Linear"))


@torchs_kinds
def test_compiled_without_graph_breaks(kind):
    torch.compiler.reset()
    module = APPLY[kind](nn.Linear(5, 4))
    wnkernel.convert(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, "Linear"), run(module, "Linear"))
    run(compiled, "Linear").sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_converted_layers_can_be_fused(computed):
    model = nn.Sequential(APPLY["torch"](nn.Linear(5, 5)), APPLY["legacy"](nn.Linear(5, 4)))
    twin = copy.deepcopy(model[:1])
    wnkernel.convert(model)
    group = wnkernel.fuse(model)
    assert group.layers == ["0.weight", "1.weight"]
    model(torch.randn(2, 5)).sum().backward()
    assert computed.take() == ([2], 0)
    assert weight_norm_kinds(twin[0]) == {"weight": TORCH}


def test_a_legacy_twin_is_still_legacy():
    """Nothing of a conversion reaches other layers of the class."""
    module, twin = legacy_weight_norm(nn.Linear(5, 4)), legacy_weight_norm(nn.Linear(5, 4))
    wnkernel.convert(module)
    assert weight_norm_kinds(twin) == {"weight": TORCH_HOOK}
    assert type(twin) is nn.Linear
    assert not hasattr(nn.Linear, "weight_g")
