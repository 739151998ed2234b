"""Models for the tests of ``wnkernel.fuse``: mixed layers, twins, comparisons by bits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wnkernel
from wnkernel import WeightNormGroup, functional
from wnkernel.grouping import slots, threads
from wnkernel.grouping.members import Member

Context = Callable[[], AbstractContextManager[object]]

REUSE = ["forward", "version"]
both_modes = pytest.mark.parametrize("reuse", REUSE)


def ramp(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An input that is the same in every call."""
    return torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape).to(dtype)


class Block(nn.Module):
    """Layers side by side, each with an input of its own: a stale weight shows in the output, and
    any of them can be left out."""

    def __init__(self, **layers: tuple[nn.Module, tuple[int, ...]]) -> None:
        super().__init__()
        self.inputs = {name: shape for name, (_, shape) in layers.items()}
        for name, (layer, _) in layers.items():
            self.add_module(name, layer)

    def forward(self, skip: Collection[str] = ()) -> Tensor:
        """The outputs one after the other, in float64."""
        return join(
            getattr(self, name)(ramp(*shape, dtype=getattr(self, name).bias.dtype))
            for name, shape in self.inputs.items()
            if name not in skip
        )


class Net(nn.Module):
    """Seven weights of mixed shapes, dims and dtypes: two containers, and a layer beside them."""

    def __init__(self) -> None:
        super().__init__()
        norm = wnkernel.weight_norm
        self.front = Block(
            conv=(norm(nn.Conv1d(4, 6, 3)), (2, 4, 8)),
            up=(norm(nn.ConvTranspose1d(6, 5, 4), dim=1), (2, 6, 3)),
            wide=(norm(nn.Linear(150, 130), dim=None), (2, 150)),  # over 64 KiB: recycled memory
        )
        self.back = Block(
            image=(norm(nn.Conv2d(4, 6, 3)), (2, 4, 5, 5)),
            fine=(norm(nn.Linear(5, 3, dtype=torch.float64)), (2, 5)),
            coarse=(norm(nn.Linear(7, 6, dtype=torch.bfloat16), dim=1, eps=1e-6), (2, 7)),
        )
        self.head = norm(nn.Linear(9, 4))

    def forward(self, skip: Collection[str] = ()) -> Tensor:
        head = () if "head" in skip else [self.head(ramp(2, 9, dtype=self.head.bias.dtype))]
        return join([self.front(skip), self.back(skip), *head])


LAYERS = ["front.conv", "front.up", "front.wide", "back.image", "back.fine", "back.coarse", "head"]
"""The weight-normed layers of :class:`Net`."""


def join(outputs: Iterable[Tensor]) -> Tensor:
    return torch.cat([y.flatten().to(torch.float64) for y in outputs])


def twins(
    reuse: str = "forward", build: Callable[[], nn.Module] = Net, **options: Any
) -> tuple[nn.Module, nn.Module, WeightNormGroup]:
    """A fused model, an unfused twin with equal parameters, and the group."""
    model = build()
    twin = copy.deepcopy(model)
    return model, twin, wnkernel.fuse(model, reuse=reuse, **options)


def layer(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name)


def originals(model: nn.Module) -> list[Tensor]:
    """g and v of every weight-normed layer."""
    return [p for name, p in model.named_parameters() if ".original" in name]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """``w`` of every weight-normed layer, read here and now."""
    return {
        name: module.weight
        for name, module in model.named_modules()
        if hasattr(module, "parametrizations")
    }


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same(got: Tensor, want: Tensor, name: str = "tensor") -> None:
    """The same bits, dtype, memory order and need of a gradient."""
    assert got.dtype == want.dtype, name
    assert got.shape == want.shape, name
    assert got.stride() == want.stride(), name
    assert got.requires_grad == want.requires_grad, name
    assert torch.equal(got, want), f"{name}: other values"


def assert_same_tensors(got: dict[str, Any], want: dict[str, Any]) -> None:
    """:func:`assert_same` for each of them; None matches None."""
    assert list(got) == list(want)
    for name in want:
        if got[name] is None or want[name] is None:
            assert got[name] is want[name], name
        else:
            assert_same(got[name], want[name], name)


def assert_same_models(fused: nn.Module, twin: nn.Module) -> None:
    """The same outputs, and the same weights within a forward and without one."""
    assert_same_tensors(weights(fused), weights(twin))
    assert_same(fused(), twin(), "output")
    assert_same_tensors(weights(fused), weights(twin))


class Computed:
    """How many weights were computed since the last :meth:`take`, and how."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launches: list[int] = []
        """The number of weights in each launch."""
        self.alone = 0
        """Weights computed singly."""
        self._inside = False
        many, single = functional.weight_norms, functional.weight_norm

        def weight_norms(v: list[Tensor], *args: Any, **kwargs: Any) -> list[Tensor]:
            with self._counted_once() as first:
                self.launches += [len(v)] if first else []
                return many(v, *args, **kwargs)

        def weight_norm(*args: Any, **kwargs: Any) -> Tensor:
            with self._counted_once() as first:
                self.alone += first
                return single(*args, **kwargs)

        monkeypatch.setattr(functional, "weight_norms", weight_norms)
        monkeypatch.setattr(functional, "weight_norm", weight_norm)

    @contextmanager
    def _counted_once(self) -> Iterator[bool]:
        """Function modes (a default device is one) call the function that they were called for."""
        first, self._inside = not self._inside, True
        try:
            yield first
        finally:
            self._inside = not first

    def take(self) -> tuple[list[int], int]:
        """``(launches, alone)``, and begin anew."""
        counted = self.launches, self.alone
        self.launches, self.alone = [], 0
        return counted


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Computed:
    """Counts from the beginning of the test."""
    return Computed(monkeypatch)


@pytest.fixture
def python_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups keep their weights as they do without the compiled module."""
    monkeypatch.setattr(threads, "slots", slots._python_slots)
    monkeypatch.setattr(slots, "launch_mode", slots._python_launch_mode)


def triple(model: nn.Module) -> None:
    """A change that also the version mode sees."""
    with torch.no_grad():
        for p in originals(model):
            p.mul_(3)


def assert_plain(model: nn.Module) -> None:
    """Nothing of a group is left."""
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        assert not module._forward_hooks_always_called
        assert not isinstance(getattr(module, "owner", None), Member)
        assert not any("container" in name for name in vars(module))


def assert_same_training(
    model: nn.Module, twin: nn.Module, *args: torch.Tensor, once: Context = nullcontext
) -> None:
    """Outputs, gradients, and both again after a change, bit for bit.

    ``once``: what surrounds the twin's forward. torch's ``parametrize.cached`` also adds the
    gradients of a weight that is used twice up before the norm's backward.
    """
    for _ in range(2):
        y = model(*args)
        with once():
            want = twin(*args)
        assert_same(y, want)
        y.square().sum().backward(), want.square().sum().backward()
        assert_same_tensors(gradients(model), gradients(twin))
        triple(model), triple(twin)
        model.zero_grad(), twin.zero_grad()
