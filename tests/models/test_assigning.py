"""``layer.weight = w`` and what else code does to a plain layer's parameters, on normed layers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval

import wnkernel

from ..groups import ramp
from ..layers import Doubled, assert_same_state, legacy_weight_norm, weight_norm_kinds
from ..layers import originals as g_and_v


def legacy_names(module: nn.Module, *args: Any) -> nn.Module:
    with wnkernel.patch_torch():
        return nn.utils.weight_norm(module, *args)


def converted(module: nn.Module, *args: Any) -> nn.Module:
    wnkernel.convert(legacy_weight_norm(module, *args))
    return module


all_makers = pytest.mark.parametrize("make", [wnkernel.weight_norm, legacy_names, converted])
kinds_of_values = pytest.mark.parametrize(
    "value", [nn.Parameter, lambda t: t], ids=["parameter", "tensor"]
)

CASES: dict[str, tuple[Callable[[], nn.Module], str, int | None, tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(5, 4), "weight", 0, (2, 5)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3), "weight", 1, (2, 4, 8)),
    "whole": (lambda: nn.ConvTranspose1d(4, 6, 3), "weight", None, (2, 4, 8)),
    "LSTM": (lambda: nn.LSTM(4, 5), "weight_hh_l0", 0, (3, 2, 4)),
}


@pytest.mark.parametrize("reuse", [None, "forward", "version"])
@kinds_of_values
@pytest.mark.parametrize("case", CASES)
@all_makers
def test_a_weight_that_is_assigned(
    make: Callable, case: str, value: Callable, reuse: str | None
) -> None:
    build, name, dim, shape = CASES[case]
    layer = make(build(), name, dim)
    parameters, hooks = dict(layer.named_parameters()), len(layer._forward_pre_hooks)
    addresses = [p.data_ptr() for p in layer.parameters()]
    group = wnkernel.fuse(layer, reuse=reuse) if reuse else None
    new = ramp(*getattr(layer, name).shape)
    if group:
        with group.scope():
            getattr(layer, name)
            setattr(layer, name, value(new.clone()))
            torch.testing.assert_close(getattr(layer, name), new)
        group.remove()
    else:
        setattr(layer, name, value(new.clone()))
    torch.testing.assert_close(getattr(layer, name), new)
    now = dict(layer.named_parameters())
    assert list(now) == list(parameters)
    assert all(now[key] is p for key, p in parameters.items())  # optimizers go on
    assert [p.data_ptr() for p in layer.parameters()] == addresses  # and what knows their memory
    assert all(p.requires_grad for p in now.values())
    assert len(layer._forward_pre_hooks) == hooks
    twin, x = build(), ramp(*shape)
    with torch.no_grad():
        for key, p in twin.named_parameters():
            p.copy_(getattr(layer, key))
    torch.testing.assert_close(layer(x), twin(x))


@kinds_of_values
def test_what_is_assigned_is_not_shared(value: Callable) -> None:
    new, layers = value(ramp(4, 5)), [wnkernel.weight_norm(nn.Linear(5, 4)) for _ in range(2)]
    for layer in layers:
        layer.weight = new
    with torch.no_grad():
        layers[0].parametrizations.weight.original1.zero_().add_(1)
    assert torch.equal(new, ramp(4, 5))
    torch.testing.assert_close(layers[1].weight, ramp(4, 5))


def test_v_and_g_of_different_dtypes() -> None:
    layer = wnkernel.weight_norm(nn.Linear(5, 4, dtype=torch.bfloat16))
    layer.parametrizations.weight.original0 = nn.Parameter(torch.ones(4, 1))
    layer.weight = ramp(4, 5).bfloat16()
    assert [p.dtype for p in g_and_v(layer)] == [torch.float32, torch.bfloat16]
    torch.testing.assert_close(layer.weight, ramp(4, 5).bfloat16())


def test_a_frozen_parameter_freezes() -> None:
    layer = wnkernel.weight_norm(nn.Linear(5, 4))
    layer.weight = nn.Parameter(ramp(4, 5), requires_grad=False)
    assert not layer.weight.requires_grad
    assert not any(p.requires_grad for p in g_and_v(layer))
    assert layer.bias.requires_grad
    layer = wnkernel.weight_norm(nn.Linear(5, 4))
    layer.parametrizations.weight.original0.requires_grad = False  # as DINO's heads have it
    layer.weight = nn.Parameter(ramp(4, 5))
    assert [p.requires_grad for p in g_and_v(layer)] == [False, True]
    layer.parametrizations.requires_grad_(False)
    layer.weight = nn.Parameter(ramp(4, 5))
    assert [p.requires_grad for p in g_and_v(layer)] == [True, True]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("shape", [(5, 4), (8, 5), (1, 5), (4, 5, 3)])
@kinds_of_values
def test_another_shape_is_taken_as_by_a_plain_layer(
    value: Callable, shape: tuple[int, ...], fused: bool
) -> None:
    layer = wnkernel.weight_norm(nn.Linear(5, 4))
    if fused:
        wnkernel.fuse(layer)
    before, new = g_and_v(layer), ramp(*shape)
    layer.weight = value(new)
    assert [p is same for p, same in zip(g_and_v(layer), before, strict=True)] == [True, True]
    torch.testing.assert_close(layer.weight, new, rtol=0, atol=0)
    new.zero_()
    assert layer.weight.any()


WRONG: dict[str, tuple[Any, str]] = {
    "dtype": (torch.ones(4, 5).half(), r"torch\.float32 on .*got torch\.float16"),
    "device": (torch.ones(4, 5, device="meta"), r"got .* on meta"),
}


@pytest.mark.parametrize("name", WRONG)
@kinds_of_values
def test_another_kind_of_weight_changes_nothing(value: Callable, name: str) -> None:
    tensor, got = WRONG[name]
    layer = wnkernel.weight_norm(nn.Linear(5, 4))
    before = [(p, p.clone()) for p in layer.parameters()]
    with pytest.raises(
        ValueError, match=rf"^weight: expected a weight like .*{got}.*remove_weight"
    ):
        layer.weight = value(tensor)
    for p, (same, values) in zip(layer.parameters(), before, strict=True):
        assert p is same
        assert torch.equal(p, values)
    assert layer.weight.shape == (4, 5)


@pytest.mark.parametrize("value", [None, 1.0, [1.0]])
def test_what_is_no_tensor(value: object) -> None:
    layer = wnkernel.weight_norm(nn.Linear(5, 4))
    with pytest.raises(TypeError, match=r"^weight: expected a torch\.Tensor, got"):
        layer.weight = value


class Sharded(torch.Tensor):
    """A tensor subclass, as DTensor and quantized weights are."""


class Special(nn.Parameter):
    """A subclass of Parameter."""


SUBCLASSES = [
    lambda t: nn.Parameter(t.as_subclass(Sharded)),
    lambda t: Special(t),
    lambda t: nn.UninitializedParameter(),
]


@pytest.mark.parametrize("key", ["weight", "parametrizations.weight.original0"])
@pytest.mark.parametrize("build", SUBCLASSES)
def test_subclasses_are_told_to_fold(build: Callable, key: str) -> None:
    layer = wnkernel.weight_norm(nn.Linear(5, 4))
    before = layer.state_dict()
    parameter = build(ramp(4, 5))
    got = rf"^{key}: expected a plain torch\.nn\.Parameter for .*wnkernel\.fold\(model\)"
    with pytest.raises(RuntimeError, match=got):
        layer.register_parameter(key, parameter)
    if key == "weight":
        with pytest.raises(RuntimeError, match=got):
            layer.weight = parameter
    assert_same_state(layer.state_dict(), before)


def test_a_convolution_takes_in_its_batch_norm() -> None:
    conv, norm = wnkernel.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)
    norm(ramp(2, 4, 5, 5))
    model = nn.Sequential(conv, norm).eval()
    fused = fuse_conv_bn_eval(conv, norm)
    torch.testing.assert_close(fused(ramp(1, 3, 5, 5)), model(ramp(1, 3, 5, 5)))
    assert weight_norm_kinds(fused)


class Halved(nn.Module):
    """A parametrization without a way back."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def test_what_has_no_way_back_is_torchs_error() -> None:
    layer = parametrize.register_parametrization(
        wnkernel.weight_norm(nn.Linear(5, 4)), "weight", Halved()
    )
    with pytest.raises(RuntimeError, match="Halved does not implement right_inverse"):
        layer.weight = ramp(4, 5)


class NoLargeValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clone()

    def right_inverse(self, x: Tensor) -> Tensor:
        if x.sum() > 100:
            raise ValueError("too much")
        return x


def test_a_value_that_v_refuses_leaves_g_as_it_is() -> None:
    layer = wnkernel.weight_norm(nn.Linear(5, 4))
    weights = layer.parametrizations.weight
    parametrize.register_parametrization(weights, "original1", NoLargeValues())
    before = layer.weight.clone()
    with pytest.raises(ValueError, match="too much"):
        layer.weight = torch.full((4, 5), 9.0)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("view", [torch.t, lambda v: v])
def test_what_has_the_memory_of_v_is_assigned(view: Callable[[Tensor], Tensor]) -> None:
    layer = wnkernel.weight_norm(nn.Linear(4, 4))
    _, v = g_and_v(layer)
    want = view(v.detach()).clone()
    layer.weight = view(v)
    torch.testing.assert_close(layer.weight, want)


def test_a_list_takes_a_weight_of_another_shape_as_torchs_does() -> None:
    weights = wnkernel.weight_norm(nn.Linear(5, 4)).parametrizations.weight
    parameters = list(weights.parameters())
    weights.right_inverse(w := ramp(6, 5))
    assert weights.original1.data_ptr() == w.data_ptr()
    assert all(a is b for a, b in zip(weights.parameters(), parameters, strict=True))
    torch.testing.assert_close(weights(), w)


def test_what_is_stacked_is_asked_too() -> None:
    layer = nn.utils.parametrizations.spectral_norm(wnkernel.weight_norm(nn.Linear(5, 4))).eval()
    layer.weight = ramp(4, 5)
    torch.testing.assert_close(layer.parametrizations.weight[0](*g_and_v(layer)), ramp(4, 5))


# type(layer)(...), as PEFT makes the layers of an adapter


class Counting(nn.Linear):
    """A class with a way of its own to register parameters."""

    def __init__(self, rows: int = 4, columns: int = 5) -> None:
        self.registered: list[str] = []
        super().__init__(columns, rows)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        self.registered.append(name)


MADE: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], str]] = {
    "Linear": (lambda: nn.Linear(5, 4), (3, 2), "weight"),
    "Conv1d": (lambda: nn.Conv1d(5, 4, 3), (4, 2, 1), "weight"),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(5, 4, 3), (4, 2, 1), "weight"),
    "LSTM": (lambda: nn.LSTM(5, 4), (4, 2), "weight_ih_l0"),
    "a class of the user": (Counting, (3, 2), "weight"),
    "without arguments": (Counting, (), "weight"),
}


@pytest.mark.parametrize("case", MADE)
@pytest.mark.parametrize("make", [wnkernel.weight_norm, legacy_names])
def test_the_type_of_a_layer_makes_plain_layers(make: Callable, case: str) -> None:
    build, arguments, name = MADE[case]
    layer = make(build(), name)
    before = {key: t.clone() for key, t in layer.state_dict().items()}
    plain = type(build())(*arguments)
    made = type(layer)(*arguments)
    assert isinstance(made, type(plain))
    assert not parametrize.is_parametrized(made)
    made.load_state_dict(plain.state_dict())
    assert_same_state(made.state_dict(), plain.state_dict())
    for one in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        one.register_parameter("another", nn.Parameter(torch.ones(1)))
        setattr(one, name, nn.Parameter(2 * getattr(plain, name)))
        assert torch.equal(getattr(one, name), 2 * getattr(plain, name))
        make(one, name)
        torch.testing.assert_close(getattr(one, name), 2 * getattr(plain, name))
        one.register_parameter("a third", nn.Parameter(torch.ones(1)))
        again = pickle.loads(pickle.dumps(copy.deepcopy(one)))
        assert torch.equal(getattr(again, name), getattr(one, name))
        nn.utils.remove_weight_norm(again, name)
        torch.testing.assert_close(getattr(again, name), 2 * getattr(plain, name))
    assert_same_state(layer.state_dict(), before)


def test_a_module_registers_parameters_in_its_own_way() -> None:
    layer = wnkernel.weight_norm(Counting())
    layer.extra = nn.Parameter(torch.ones(1))
    layer.weight = nn.Parameter(ramp(4, 5))
    wnkernel.remove_weight_norm(layer)
    assert {*layer.registered} == {"weight", "bias", "extra"}
    assert layer.registered.index("extra") == 2  # what was assigned to a normed weight is not one
    assert isinstance(layer, Counting)


def test_another_parametrization_of_the_layer_takes_its_own_weight() -> None:
    layer = wnkernel.weight_norm(nn.GRU(5, 4), "weight_ih_l0")
    parametrize.register_parametrization(layer, "weight_hh_l0", Doubled())
    value = nn.Parameter(ramp(12, 4))
    layer.register_parameter("weight_hh_l0", value)
    assert torch.equal(layer.parametrizations.weight_hh_l0.original, value / 2)
    assert torch.equal(layer.weight_hh_l0, value)


# Legacy names


def test_legacy_names_are_assigned() -> None:
    layer = legacy_names(nn.Linear(5, 4))
    g, v = nn.Parameter(torch.full((4, 1), 2.0)), nn.Parameter(ramp(4, 5))
    layer.weight_g, layer.weight_v = g, v
    assert g_and_v(layer) == (g, v)
    assert g_and_v(layer)[0] is g
    torch.testing.assert_close(layer.weight.norm(dim=1), torch.full((4,), 2.0))
    assert "weight_g" not in layer._parameters
    twin = legacy_weight_norm(nn.Linear(5, 4))
    for module in (layer, twin):
        with pytest.raises(
            TypeError, match=r"cannot assign 'torch\.FloatTensor' as parameter 'wei"
        ):
            module.weight_g = torch.ones(4, 1)
    layer.register_parameter("weight_g", nn.Parameter(torch.ones(4, 1)))
    assert g_and_v(layer)[0] is not g


def test_half_of_a_weight_norm_cannot_be_deleted() -> None:
    layer = legacy_names(nn.Linear(5, 4))
    for name in ("weight_g", "weight_v"):
        with pytest.raises(AttributeError, match=r"both g and v.*wnkernel\.remove_weight_norm"):
            delattr(layer, name)
    layer(ramp(1, 5))
    wnkernel.remove_weight_norm(layer)
    with pytest.raises(AttributeError):
        del layer.weight_g
