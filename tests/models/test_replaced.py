"""Whatever is replaced or hooked in a parametrization is honoured when a weight is read: alone and
in a group."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import wnkernel
from wnkernel.norm_module import WeightNorm
from wnkernel.parametrization import WeightNormList

from ..groups import Computed

grouped_or_not = pytest.mark.parametrize("reuse", [None, "forward", "version"])


class Reader(nn.Sequential):
    """Returns the weights of its layers."""

    def forward(self) -> tuple[Tensor, ...]:
        return tuple(layer.weight for layer in self)


def build(reuse: str | None) -> Reader:
    model = Reader(*(wnkernel.weight_norm(nn.Linear(5, 4)) for _ in range(3)))
    if reuse:
        wnkernel.fuse(model, reuse=reuse)
    return model


# What doubles the weight of a layer, or of all layers


def doubled(of: Callable[..., Tensor], kind: type = object) -> Callable[..., Tensor]:
    def call(*args: Any, **kwargs: Any) -> Tensor:
        result = of(*args, **kwargs)
        return 2 * result if kind is object or isinstance(args[0], kind) else result

    return call


def replaced(module: nn.Module, forward: Callable[..., Tensor], name: str = "forward") -> Any:
    return mock.patch.object(module, name, forward)


class DoubledNorm(WeightNorm):
    def forward(self, weight_g: Tensor, weight_v: Tensor) -> Tensor:
        return 2 * super().forward(weight_g, weight_v)


class DoubledList(WeightNormList):
    def forward(self) -> Tensor:
        return 2 * super().forward()


@contextmanager
def of_class(module: nn.Module, cls: type) -> Iterator[None]:
    before = type(module)
    module.__class__ = cls
    try:
        yield
    finally:
        module.__class__ = before


@contextmanager
def removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def as_accelerate_does(module: nn.Module) -> Any:
    """``add_hook_to_module``."""

    def forward(module: nn.Module, *args: Any) -> Tensor:
        return 2 * type(module).forward(module, *args)

    wrapped = functools.update_wrapper(functools.partial(forward, module), module.forward)
    return replaced(module, wrapped)


def forward_of_another(weights: WeightNormList) -> Any:
    """A method of the right class, bound to an instance whose g is twice as large."""
    layer = wnkernel.weight_norm(nn.Linear(5, 4))
    other = layer.parametrizations.weight
    other.load_state_dict({"original0": 2 * weights.original0, "original1": weights.original1})
    return replaced(weights, other.forward)


def twice(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


def twice_if_normed(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    return 2 * output if isinstance(module, WeightNorm) else None


def twice_g(module: nn.Module, args: Any) -> Any:
    return (2 * args[0], args[1]) if isinstance(module, WeightNorm) else None


def patched(cls: type, name: str, kind: type = object) -> Any:
    return mock.patch.object(cls, name, doubled(getattr(cls, name), kind))


ONE: dict[str, Callable[[WeightNormList, WeightNorm], Any]] = {
    "forward of the list": lambda weights, norm: replaced(weights, doubled(weights.forward)),
    "forward of the norm": lambda weights, norm: replaced(norm, doubled(norm.forward)),
    "partial on the list": lambda weights, norm: as_accelerate_does(weights),
    "partial on the norm": lambda weights, norm: as_accelerate_does(norm),
    "forward of another list": lambda weights, norm: forward_of_another(weights),
    "call of the list": lambda weights, norm: replaced(
        weights, doubled(weights._call_impl), "_call_impl"
    ),
    "call of the norm": lambda weights, norm: replaced(
        norm, doubled(norm._call_impl), "_call_impl"
    ),
    "class of the list": lambda weights, norm: of_class(weights, DoubledList),
    "class of the norm": lambda weights, norm: of_class(norm, DoubledNorm),
    "hook of the list": lambda weights, norm: removed(weights.register_forward_hook(twice)),
    "hook of the norm": lambda weights, norm: removed(norm.register_forward_hook(twice)),
    "pre-hook of the norm": lambda weights, norm: removed(norm.register_forward_pre_hook(twice_g)),
    "hook with kwargs": lambda weights, norm: removed(
        norm.register_forward_hook(lambda m, args, kwargs, y: 2 * y, with_kwargs=True)
    ),
}
ALL: dict[str, Callable[[], Any]] = {
    "WeightNorm.forward": lambda: patched(WeightNorm, "forward"),
    "WeightNormList.forward": lambda: patched(WeightNormList, "forward"),
    "ParametrizationList.forward": lambda: patched(parametrize.ParametrizationList, "forward"),
    "ParametrizationList.__call__": lambda: patched(parametrize.ParametrizationList, "__call__"),
    "WeightNorm.__call__": lambda: patched(WeightNorm, "__call__"),
    "WeightNorm._call_impl": lambda: patched(WeightNorm, "_call_impl"),
    "WeightNormList._call_impl": lambda: patched(WeightNormList, "_call_impl"),
    "Module.__call__": lambda: patched(nn.Module, "__call__", WeightNorm),
    "Module._call_impl": lambda: patched(nn.Module, "_call_impl", WeightNorm),
    "hook of all": lambda: removed(hooks_of_all.register_module_forward_hook(twice_if_normed)),
    "pre-hook of all": lambda: removed(hooks_of_all.register_module_forward_pre_hook(twice_g)),
}


@grouped_or_not
@pytest.mark.parametrize("name", [*ONE, *ALL])
def test_a_replacement_counts_as_long_as_it_is_there(reuse: str | None, name: str) -> None:
    model = build(reuse)
    before = model()
    weights = model[1].parametrizations.weight
    with ONE[name](weights, weights[0]) if name in ONE else ALL[name]():
        after = model()
        outside = [layer.weight for layer in model]
    for k in range(3):
        factor = 2 if k == 1 or name in ALL else 1
        assert torch.equal(after[k], factor * before[k])
        assert torch.equal(outside[k], factor * before[k])
    for y, want in zip(model(), before, strict=True):
        assert torch.equal(y, want)


OBSERVERS: dict[str, Callable[[WeightNormList, WeightNorm, Callable], Any]] = {
    "pre-hook of the list": lambda weights, norm, see: weights.register_forward_pre_hook(see),
    "backward of the list": lambda weights, norm, see: weights.register_full_backward_hook(see),
    "backward of the norm": lambda weights, norm, see: norm.register_full_backward_hook(see),
    "before the backward of the list": lambda weights, norm, see: (
        weights.register_full_backward_pre_hook(see)
    ),
    "before the backward of the norm": lambda weights, norm, see: (
        norm.register_full_backward_pre_hook(see)
    ),
    "backward of all": lambda weights, norm, see: (
        hooks_of_all.register_module_full_backward_hook(see)
    ),
    "before the backward of all": lambda weights, norm, see: (
        hooks_of_all.register_module_full_backward_pre_hook(see)
    ),
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@grouped_or_not
@pytest.mark.parametrize("name", OBSERVERS)
def test_hooks_that_observe_are_called(reuse: str | None, name: str) -> None:
    model = build(reuse)
    model()
    weights = model[1].parametrizations.weight
    seen = []
    with removed(OBSERVERS[name](weights, weights[0], lambda module, *_: seen.append(module))):
        torch.cat(model()).sum().backward()
    assert sum(module in (weights, weights[0]) for module in seen) == (2 if "all" in name else 1)
    assert all(p.grad is not None for key, p in model.named_parameters() if "original" in key)


@grouped_or_not
@pytest.mark.parametrize("part", ["list", "norm"])
def test_a_compiled_parametrization_is_called(reuse: str | None, part: str) -> None:
    model = build(reuse)
    before = model()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    weights = model[1].parametrizations.weight
    (weights if part == "list" else weights[0]).compile(backend=backend)
    for y, want in zip(model(), before, strict=True):
        assert torch.equal(y, want)
    assert len(graphs) == 1


# Offloading


def offload(weights: WeightNormList) -> list[str]:
    """Keep g and v elsewhere between two calls, as libraries for large models do."""
    held = {name: p.detach().clone() for name, p in weights.named_parameters(recurse=False)}
    forward, calls = weights.forward, []

    def place(device: str) -> None:
        for name, t in held.items():
            weights._parameters[name] = nn.Parameter(t.to(device), requires_grad=False)

    def load_and_call() -> Tensor:
        calls.append("forward")
        place("cpu")
        try:
            return forward()
        finally:
            place("meta")

    weights.forward = load_and_call
    place("meta")
    return calls


@grouped_or_not
@pytest.mark.parametrize("which", [(1,), (0, 2), (0, 1, 2)])
def test_offloaded_parameters(
    reuse: str | None, which: tuple[int, ...], computed: Computed
) -> None:
    model = build(reuse)
    before = model()
    calls = [offload(model[k].parametrizations.weight) for k in which]
    for n in range(1, 4):
        computed.take()
        for y, want in zip(model(), before, strict=True):
            assert torch.equal(y, want)
        assert [len(c) for c in calls] == [n] * len(which)
        launches, alone = computed.take()
        assert alone == (len(which) if reuse else 3)
        assert sum(launches) == (3 - len(which) if reuse == "forward" else 0)
        for k in which:
            assert all(p.is_meta for p in model[k].parametrizations.weight.parameters())


# Modes of torch


class SeesFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not hasattr(func, "__self__"):  # not of attributes of tensors
            self.seen.append(func)
        return func(*args, **(kwargs or {}))


class SeesOperators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [SeesFunctions, SeesOperators])
@grouped_or_not
def test_each_mode_sees_every_weight_norm(backend: str, reuse: str | None, mode: Callable) -> None:
    model, twin = build(reuse), build(None)
    wnkernel.weight_norm(other := nn.Linear(5, 4))
    with mode() as one:
        _ = other.weight
    with ExitStack() as stack:
        if reuse:
            stack.enter_context(wnkernel.WeightNormGroup.of(model).scope())
            model()
        for _ in range(2):  # the second is another mode
            for module in (model, twin):
                with mode() as all_three:
                    for layer in module:
                        _ = layer.weight
                assert all_three.seen == 3 * one.seen != []


@pytest.mark.parametrize("native", [True, False])
def test_a_default_device_keeps_the_group(
    native: bool, computed: Computed, request: pytest.FixtureRequest
) -> None:
    if not native:
        request.getfixturevalue("python_slots")
    model = build("forward")
    before = torch.empty(0).device
    torch.set_default_device(before)
    try:
        with torch.device(before):
            model()
    finally:
        torch.set_default_device(None if before.type == "cpu" else before)
    launches, alone = computed.take()
    assert {*launches} == {3}  # torch asks the mode first, and comes once more
    assert alone == 0
