"""Many threads at one fused model: they read, differentiate, refresh and fail, while one fuses it
anew. Each gets the bits of a model that nobody fused."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import nn

import wnkernel
from wnkernel import WeightNormGroup

from ..groups import Net, assert_plain, both_modes, originals, twins, weights
from ..threads import Failure, failing_saves, together
from . import cases

THREADS = 6


@pytest.fixture(autouse=True)
def _often() -> Iterator[None]:
    """Threads take turns every few bytecodes."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def repeat(times: int, function: Callable[[], object]) -> None:
    for _ in range(times):
        function()


def read(group: WeightNormGroup, model: nn.Module) -> None:
    with group.scope():
        weights(model)


@both_modes
@pytest.mark.parametrize("what", ["memory", "remove"])
def test_threads_come_while_a_group_is_looked_at_or_removed(reuse: str, what: str) -> None:
    """A thread is new to a group at its first read."""
    model = Net()
    for _ in range(cases(60)):
        group = wnkernel.fuse(model, reuse=reuse)
        user, owner = partial(read, group, model), partial(repeat, 20, getattr(group, what))
        together(*[user] * THREADS, *[owner] * 2)
        group.remove()
        assert_plain(model)


FAILING = threading.Lock()


class Storm:
    """One model, its twin, and what a thread may do to the first of them."""

    def __init__(self, reuse: str) -> None:
        self.reuse = reuse
        self.model, twin, _ = twins(reuse)
        self.y = twin()
        self.grads = torch.autograd.grad(self.y.sum(), originals(twin))
        with torch.no_grad():
            self.weights = weights(twin)

    def act(self, chance: random.Random) -> None:
        """Do one of them; its result has to be that of the twin."""
        actions = [self.differentiate, self.infer, self.read, self.fail, self.refresh]
        chance.choice([*actions, torch.inference_mode()(self.infer)])()

    def differentiate(self) -> None:
        y = self.model()
        self.check([y, *torch.autograd.grad(y.sum(), originals(self.model))], [self.y, *self.grads])

    def infer(self) -> None:
        with torch.no_grad():
            self.check([self.model()], [self.y])

    def read(self) -> None:
        if group := self.group():
            with group.scope():
                self.check(weights(self.model).values(), self.weights.values())
            group.memory()

    def fail(self) -> None:
        """In a backward, one thread at a time: several abort in torch's code, plain layers too."""
        with failing_saves():
            y = self.model()
        with FAILING, pytest.raises(Failure):
            y.sum().backward()

    def refresh(self) -> None:
        if group := self.group():
            group.refresh()

    def group(self) -> WeightNormGroup | None:
        try:
            return WeightNormGroup.of(self.model)
        except ValueError:  # given back at this moment
            return None

    def fuse(self) -> None:
        WeightNormGroup.of(self.model).remove()
        wnkernel.fuse(self.model, reuse=self.reuse)

    @staticmethod
    def check(got: object, want: object) -> None:
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


@both_modes
def test_a_storm(reuse: str) -> None:
    storms = [Storm(reuse) for _ in range(2)]

    def user(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(30):
            chance.choice(storms).act(chance)

    def owner() -> None:
        chance = random.Random(0)
        for _ in range(30):
            chance.choice(storms).fuse()

    for seed in range(0, cases(30), 30):
        together(owner, *(partial(user, seed + k) for k in range(THREADS)))
    for storm in storms:
        assert torch.equal(storm.model(), storm.y)
        if reuse == "forward":
            assert WeightNormGroup.of(storm.model).memory()["slots"] == 0
