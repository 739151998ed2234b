"""The members of a group: its weights, the modules around them, and what all of these share.

References go one way: a module holds its member or container, which holds the roster, which refers
to all members and containers weakly. So a group keeps no module alive and makes no reference cycle.
A deep copy of the root copies the group, and a deep copy of a part of the root has no group.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import functional
from ..forced_layers import ForcedWeightNormList
from ..forcing import Terms, forced_weights
from ..parametrization import WeightNormList, autocast_dtype
from .slots import Mode

NormedList = WeightNormList | ForcedWeightNormList
"""The list of parametrizations of a weight that can be in a group."""


class TakesWeights(Protocol):
    """The part of a thread's state (threads.py) that a member uses."""

    def take(self, member: Member, v: Tensor, g: Tensor) -> Tensor | None:
        """Return ``w`` of a member if the thread has it or can compute it with others, else
        None."""


class Forgets(Protocol):
    """The part of the states of all threads that a roster uses."""

    def forget(self) -> None:
        """Drop all computed weights, in every thread."""


class OfThreads(Protocol):
    """The thread states that :func:`wnkernel.fuse` gives to a roster."""

    @property
    def current(self) -> TakesWeights:
        """The state of the current thread."""

    @property
    def registry(self) -> Forgets:
        """The states of all threads."""


class Roster:
    """The state that the members and containers of one group share."""

    def __init__(
        self,
        root: nn.Module | None,
        reuse: str,
        autocast: bool,
        new_threads: Callable[[], OfThreads],
    ) -> None:
        self.reuse = reuse
        self.autocast = autocast
        self.members: list[Callable[[], Member | None]] = []
        self.containers: list[Callable[[], Container | None]] = []
        self.latest_refresh = object()
        """An object that is replaced whenever all computed weights must be dropped."""
        self.removed = False
        self._new_threads = new_threads
        self.threads = new_threads()
        registry = self.threads.registry  # self would make a cycle
        self.root = _nobody if root is None else weakref.ref(root, lambda _: registry.forget())

    def remove(self) -> None:
        """Keep new scopes from being opened, then drop the slots and scopes of all threads."""
        self.removed = True
        self.threads.registry.forget()

    def out_dtype(self, v: Tensor) -> torch.dtype | None:
        """The dtype that ``w`` is computed in; None means v's own."""
        return autocast_dtype(v) if self.autocast else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Roster:
        root = self.root()
        new_root = copy.deepcopy(root, memo)  # it is copied already, unless the copy begins here
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
        """The roster of the copy that is being made; None if the copy does not include the root."""
        return copy.deepcopy(self, memo) if id(self.root()) in memo else None


class Member:
    """One weight of a group, as the owner of its list of parametrizations."""

    is_group = True

    def __init__(
        self,
        roster: Roster,
        weights: NormedList,
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
        self.index = _enroll(roster.members, self, index)  # last, as other threads find it there

    def read(self, v: Tensor, g: Tensor, dim: int, eps: float) -> Tensor:
        """Return ``w`` from the group if the group has it or can compute it now, else compute it
        alone."""
        w = self.roster.threads.current.take(self, v, g)
        return self.alone(v, g, dim, eps) if w is None else w

    def read_forced(self, terms: Terms) -> Tensor:
        """Return ``w`` of a forced weight norm, like :meth:`read`."""
        w = self.roster.threads.current.take(self, terms.v, terms.g)
        if w is not None:
            return w
        return forced_weights([terms], self.roster.out_dtype(terms.v))[0]

    def alone(self, v: Tensor, g: Tensor, dim: int, eps: float) -> Tensor:
        """Compute ``w`` of this weight alone."""
        return functional.weight_norm(v, g, dim, eps=eps, out_dtype=self.roster.out_dtype(v))

    def innermost(self, kinds: tuple[type[nn.Module], ...]) -> int | None:
        """The ``id`` of the innermost module around the weight that is of one of some classes, or
        None."""
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
        """The members that the previous forward of the module read, for each mode."""
        self.index = _enroll(roster.containers, self, index)

    def is_root(self) -> bool:
        """Whether the module is the one that :func:`wnkernel.fuse` was called with."""
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
    """Put an entry into a list of a roster: at the end, or, in a copy, at the index of its
    original."""
    if index is None:
        registry.append(_nobody)
        index = len(registry) - 1
    registry[index] = weakref.ref(entry)
    return index


def _nobody() -> None:
    """Stand for a weak reference whose object is gone."""
