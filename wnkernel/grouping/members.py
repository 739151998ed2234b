"""Who is in a group: its weights, the modules around them, and what all of these share.

References go one way: modules hold their member or container, which hold the roster, which knows
everybody weakly. So a group keeps no module alive and makes no reference cycle. Copies follow their
root: deep-copying it copies the group, deep-copying a part of it leaves the part without one.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import functional
from ..parametrization import WeightNormList, autocast_dtype
from .slots import Mode


class ThreadState(Protocol):
    """What a member asks of the state of its thread (threads.py)."""

    def take(self, member: Member, v: Tensor, g: Tensor) -> Tensor | None:
        """``w`` of a member, if the thread has it or can compute it with others."""


class Registry(Protocol):
    """What a roster asks of the states of all threads."""

    def forget(self) -> None:
        """Let go of all that was computed, in every thread."""


class Threads(Protocol):
    """What a roster gets from :func:`wnkernel.fuse`."""

    @property
    def current(self) -> ThreadState:
        """The state of the thread that asks."""

    @property
    def registry(self) -> Registry:
        """The states of all threads."""


class Roster:
    """What the members and containers of one group share."""

    def __init__(
        self,
        root: nn.Module | None,
        reuse: str,
        autocast: bool,
        new_threads: Callable[[], Threads],
    ) -> None:
        self.reuse = reuse
        self.autocast = autocast
        self.members: list[Callable[[], Member | None]] = []
        self.containers: list[Callable[[], Container | None]] = []
        self.latest_refresh = object()
        """Another one whenever all that was computed has to be thrown away."""
        self.removed = False
        self._new_threads = new_threads
        self.threads = new_threads()
        registry = self.threads.registry  # not self: no cycle
        self.root = _nobody if root is None else weakref.ref(root, lambda _: registry.forget())

    def remove(self) -> None:
        """Let nobody open a scope any more, then let go of the slots and scopes of all threads."""
        self.removed = True
        self.threads.registry.forget()

    def out_dtype(self, v: Tensor) -> torch.dtype | None:
        """The dtype that ``w`` is computed in; None: v's own."""
        return autocast_dtype(v) if self.autocast else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Roster:
        root = self.root()
        new_root = copy.deepcopy(root, memo)  # copied already, unless the copy begins here
        if (done := memo.get(id(self))) is not None:
            return done
        new = memo[id(self)] = Roster(new_root, self.reuse, self.autocast, self._new_threads)
        new.reserve(len(self.members), len(self.containers))
        return new

    def reserve(self, members: int, containers: int) -> None:
        """Make places for the members and containers of a copy, which keep their indices."""
        self.members = [_nobody] * members
        self.containers = [_nobody] * containers

    def copy_with_root(self, memo: dict[int, Any]) -> Roster | None:
        """The roster of a copy that is being made, or None if the root is not part of it."""
        return copy.deepcopy(self, memo) if id(self.root()) in memo else None


class Member:
    """One weight of a group; what its ``WeightNormList`` asks when it is read."""

    is_group = True

    def __init__(
        self,
        roster: Roster,
        weights: WeightNormList,
        name: str,
        bucket: int,
        around: Sequence[nn.Module],
        index: int | None = None,
    ) -> None:
        self.roster = roster
        self.weights = weakref.ref(weights)
        self.name = name
        self.bucket = bucket
        self._around = [weakref.ref(module) for module in around]
        self.index = _enroll(roster.members, self, index)  # last: others find it there

    def read(self, v: Tensor, g: Tensor, dim: int, eps: float) -> Tensor:
        """``w``: from the group if it has it or can compute it now, else computed alone."""
        w = self.roster.threads.current.take(self, v, g)
        return self.alone(v, g, dim, eps) if w is None else w

    def alone(self, v: Tensor, g: Tensor, dim: int, eps: float) -> Tensor:
        """``w``, computed now and for nobody else."""
        return functional.weight_norm(v, g, dim, eps=eps, out_dtype=self.roster.out_dtype(v))

    def innermost(self, kinds: tuple[type[nn.Module], ...]) -> int | None:
        """Identity of the innermost module of some kinds around the weight."""
        return next((id(m) for m in self.modules_around() if isinstance(m, kinds)), None)

    def modules_around(self) -> list[nn.Module]:
        """The modules around the weight that still exist, innermost first."""
        return [module for ref in self._around if (module := ref()) is not None]

    def __deepcopy__(self, memo: dict[int, Any]) -> Member | None:
        roster = self.roster.copy_with_root(memo)
        weights = memo.get(id(self.weights()))
        if roster is None or weights is None:
            return None
        around = [memo[id(m)] for m in self.modules_around() if id(m) in memo]
        return Member(roster, weights, self.name, self.bucket, around, self.index)


class Container:
    """A module with several members beneath it, whose forward is a scope."""

    def __init__(
        self,
        roster: Roster,
        module: nn.Module,
        members: Sequence[int],
        index: int | None = None,
    ) -> None:
        self.roster = roster
        self.module = weakref.ref(module)
        self.members = frozenset(members)
        self.previous: dict[Mode, list[int]] = {}
        """The members that its previous forward read."""
        self.index = _enroll(roster.containers, self, index)

    def is_root(self) -> bool:
        """Whether its module is the one that :func:`wnkernel.fuse` was called with."""
        module = self.module()
        return module is not None and self.roster.root() is module

    def likely(self, mode: Mode, index: int) -> list[int]:
        """The members that a forward is likely to read: the one at ``index`` and those of the
        previous forward, or all if there was none."""
        return sorted({index, *self.previous.get(mode, self.members)})

    def __deepcopy__(self, memo: dict[int, Any]) -> Container | None:
        roster = self.roster.copy_with_root(memo)
        module = memo.get(id(self.module()))
        if roster is None or module is None:
            return None
        return Container(roster, module, sorted(self.members), self.index)


def _enroll(registry: list[Callable[[], Any]], entry: object, index: int | None) -> int:
    """Put an entry into a roster: at the end, or, in a copy, where its original stands."""
    if index is None:
        registry.append(_nobody)
        index = len(registry) - 1
    registry[index] = weakref.ref(entry)
    return index


def _nobody() -> None:
    """A reference to what is not there."""
