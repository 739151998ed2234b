"""Copies of weight-normed modules share a class until one of them is changed."""

from __future__ import annotations

import abc
import copy
import gc
import inspect
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrize, prune

import wnkernel

from ..small_models import ramp


class Block(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).relu()


def test_a_stack_of_copies_is_compiled_as_often_as_a_plain_one() -> None:
    counts = []
    for layer in (nn.Linear(4, 4), wnkernel.weight_norm(nn.Linear(4, 4))):
        torch.compiler.reset()
        block, graphs = Block(layer), CompileCounter()
        y = ramp(1, 4).requires_grad_()
        for copied in [copy.deepcopy(block) for _ in range(12)]:
            copied.compile(backend=graphs, fullgraph=True)
            y = copied(y)
        counts.append(graphs.frame_count)
    assert counts[0] == counts[1]


def test_an_ensemble_of_copies() -> None:
    layer = wnkernel.weight_norm(nn.Linear(4, 4))
    layers = [copy.deepcopy(layer) for _ in range(3)]
    for layer, bias in zip(layers, ramp(3, 4), strict=True):
        layer.bias = nn.Parameter(bias)
    parameters, buffers = torch.func.stack_module_state(layers)

    def call(*state: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layers[0], state, (ramp(2, 4),))

    got = torch.vmap(call)(parameters, buffers)
    torch.testing.assert_close(got, torch.stack([layer(ramp(2, 4)) for layer in layers]))


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "torch removes it": lambda m: nn.utils.remove_weight_norm(m),
    "parametrize removes it": lambda m: parametrize.remove_parametrizations(m, "weight"),
    "ours removes it": lambda m: wnkernel.remove_weight_norm(m),
    "fold": lambda m: wnkernel.fold(m),
    "fuse": lambda m: wnkernel.fuse(m),
    "another weight norm": lambda m: wnkernel.weight_norm(m, "other", dim=1),
    "torch's weight norm": lambda m: nn.utils.parametrizations.weight_norm(m, "other"),
    "spectral norm": lambda m: nn.utils.parametrizations.spectral_norm(m, "other"),
    "pruning of a normed weight": lambda m: prune.l1_unstructured(
        m.parametrizations.weight, "original1", 0.5
    ),
}


class TwoWeights(nn.Linear):
    """A layer with a second weight, which may be normed too."""

    def __init__(self) -> None:
        super().__init__(5, 4)
        self.other = nn.Parameter(ramp(4, 4) + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ self.other


CASES = [(change, "weight") for change in CHANGES] + [
    (change, "weight and other") for change in CHANGES if "norm" not in change
]


@pytest.mark.parametrize(("change", "normed"), CASES)
def test_a_change_of_one_copy_is_not_one_of_the_others(change: str, normed: str) -> None:
    torch.compiler.reset()
    first, names = TwoWeights().eval(), normed.split(" and ")
    for name in names:
        wnkernel.weight_norm(first, name)
    second, third = copy.deepcopy(first), copy.deepcopy(first)
    x, want = ramp(2, 5), first(ramp(2, 5)).detach()
    CHANGES[change](second)
    for layer in (first, third):
        assert [*layer.parametrizations] == names
        torch.testing.assert_close(layer(x), want)
    if "pruning" not in change and "spectral" not in change:
        torch.testing.assert_close(second(x), want)
    compiled = torch.compile(second, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), second(x))
    wnkernel.remove_weight_norm(first)
    torch.testing.assert_close(third(x), want)


def test_copies_have_weights_of_their_own_in_the_cache() -> None:
    layer = wnkernel.weight_norm(nn.Linear(5, 4))
    with parametrize.cached():
        first: Tensor = layer.weight
        assert layer.weight is first
        for factor in (2, 3, 4):  # each copy goes before the next one comes
            other = copy.deepcopy(layer)
            with torch.no_grad():
                other.parametrizations.weight.original0.mul_(factor)
            torch.testing.assert_close(other.weight, factor * first)
            assert other.weight is other.weight
            del other
        assert layer.weight is first
    assert layer.weight is not first


class Equal(nn.Linear):
    """Equal to every layer of the same size."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Equal) and self.in_features == other.in_features

    def __hash__(self) -> int:
        return self.in_features


def test_layers_that_are_equal_have_weights_of_their_own_in_the_cache() -> None:
    layers = [wnkernel.weight_norm(Equal(4, 3)) for _ in range(2)]
    want = [layer.weight.clone() for layer in layers]
    with parametrize.cached():
        for _ in range(2):
            for layer, w in zip(layers, want, strict=True):
                assert torch.equal(layer.weight, w)


def test_a_layer_needs_no_garbage_collector() -> None:
    layer = wnkernel.weight_norm(nn.Linear(5, 4))
    dead = [weakref.ref(module) for module in (layer, copy.deepcopy(layer))]
    kept = copy.deepcopy(layer)
    gc.disable()
    try:
        layer(ramp(1, 5))
        alive = weakref.ref(layer)
        del layer
        assert alive() is None
    finally:
        gc.enable()
    assert [ref() for ref in dead] == [None, None]
    assert kept.weight.shape == (4, 5)


class Adapter(nn.Linear):
    """A layer with names that other libraries ask for."""

    base_layer = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.args = args

    def __reduce__(self) -> tuple[Any, ...]:
        return Adapter, self.args, {"bias": self.bias}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.bias = state["bias"]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.base_layer is None else self.base_layer(x)


def test_what_a_class_has_itself_stays() -> None:
    layer = wnkernel.weight_norm(Adapter(4, 3))
    assert layer.base_layer is None
    layer(ramp(1, 4))
    loaded = pickle.loads(pickle.dumps(layer))
    assert type(loaded) is Adapter
    assert torch.equal(loaded.bias, layer.bias)


def test_registries_see_a_class_once() -> None:
    """As with torch's weight norm, whose classes they see too."""
    names = []

    class Registered(nn.Linear):
        def __init_subclass__(cls) -> None:
            names.append(cls.__name__)

    class Layer(Registered):
        pass

    def normed() -> nn.Module:
        layer = wnkernel.weight_norm(Layer(4, 3))
        layer.other = nn.Parameter(ramp(2, 3))
        return wnkernel.weight_norm(layer, "other")

    parametrize.remove_parametrizations(normed(), "weight")
    nn.utils.remove_weight_norm(normed())
    wnkernel.fold(normed())
    assert names == ["Layer", *3 * ["ParametrizedLayer"]]


def test_a_class_has_the_signature_of_its_plain_layers() -> None:
    layer = wnkernel.weight_norm(nn.Conv1d(4, 3, 2))
    layer.also = nn.Parameter(ramp(2, 3))
    wnkernel.weight_norm(layer, "also")
    assert inspect.signature(type(layer)) == inspect.signature(nn.Conv1d)
    assert inspect.signature(layer) == inspect.signature(nn.Conv1d(4, 3, 2))


def test_a_removal_by_torch_does_not_touch_layers_that_share_the_class() -> None:
    """It deletes the property of the weight from the class, before anything else."""
    a, b = (wnkernel.weight_norm(nn.Linear(4, 3)) for _ in range(2))
    assert type(a) is type(b)
    want = b.weight
    delattr(type(a), "weight")
    assert torch.equal(b.weight, want)


@pytest.mark.parametrize("other", [False, True])
def test_a_removal_by_torch_without_our_load_hook(other) -> None:
    layers = [wnkernel.weight_norm(nn.Linear(4, 3)) for _ in range(2)]
    for layer in layers:
        if other:
            layer.also = nn.Parameter(ramp(2, 3))
            wnkernel.weight_norm(layer, "also")
    a, b = layers
    assert type(a) is type(b)
    want = a.weight.detach().clone(), b.weight.detach().clone()
    a._load_state_dict_pre_hooks.clear()
    parametrize.remove_parametrizations(a, "weight")
    assert torch.equal(a.weight, want[0])
    assert torch.equal(b.weight, want[1])
    with torch.no_grad():
        a.weight.zero_()
    assert not a.weight.any()
    assert type(a.weight) is nn.Parameter
    assert torch.equal(b.weight, want[1])


def test_a_class_that_somebody_changed_is_not_that_of_new_layers() -> None:
    class Layer(nn.Linear):
        pass

    old = wnkernel.weight_norm(Layer(4, 3))
    type(old).forward = lambda self, x: "changed"
    new = wnkernel.weight_norm(Layer(4, 3))
    assert torch.is_tensor(new(torch.ones(4)))


def test_a_class_whose_weight_somebody_replaced_is_not_that_of_new_layers() -> None:
    class Layer(nn.Linear):
        pass

    old = wnkernel.weight_norm(Layer(4, 3))
    type(old).weight = property(lambda self: torch.zeros(3, 4))
    new = wnkernel.weight_norm(Layer(4, 3))
    assert new.weight.all()
    assert not old.weight.any()
    del type(old).weight
    assert not hasattr(old, "weight")


def test_a_property_of_somebody_else_can_be_deleted() -> None:
    class Layer(nn.Linear):
        pass

    layer = wnkernel.weight_norm(Layer(4, 3))
    type(layer).rows = property(lambda self: 3)
    del type(layer).rows
    assert not hasattr(layer, "rows")


def test_a_class_of_two_layers_may_be_a_base_beside_an_abstract_one() -> None:
    class Abstract(abc.ABC):
        @abc.abstractmethod
        def rows(self) -> int: ...

    layers = [wnkernel.weight_norm(nn.Linear(4, 3)) for _ in range(2)]

    class Layer(type(layers[0]), Abstract):
        def rows(self) -> int:
            return 3

    assert type(layers[0]) is type(layers[1])
    assert Layer(4, 3)(ramp(1, 4)).shape == (1, 3)


def test_subclasses_of_the_parametrization_may_be_mixed() -> None:
    class Mixin:
        flags: list[int] = []  # noqa: RUF012

        def __init_subclass__(cls, flag: int, **kwargs: object) -> None:
            super().__init_subclass__(**kwargs)
            cls.flags.append(flag)

    class Norm(wnkernel.WeightNorm, Mixin, flag=1):
        pass

    assert Mixin.flags == [1]
    assert Norm.is_subclass
    assert not wnkernel.WeightNorm.is_subclass
