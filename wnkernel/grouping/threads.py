"""What one thread has computed of one group, how it computes it, and how long that may serve.

A launch computes many members at once and puts each into a slot. With ``reuse="forward"`` slots
live until the outermost scope ends; with ``reuse="version"`` until one shows a change, an optimizer
steps, or someone asks.

Only its own thread changes what is in a :class:`ThreadState`, at any bytecode of which an interrupt
may come. Other threads replace its stack and its records by empty ones
(:meth:`ThreadState.forget`), so a method reads each of these once.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import FrameType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .. import functional
from ..keys import G, V
from ..observers import PLAIN, has_memory, is_forward_ad, sharding_modules
from ..parametrization import classes_are_as_made
from ..streams import captured_device
from .members import Container, Member, Roster
from .running import has_ended, steps
from .slots import Mode, PythonSlot, current_mode, slots


class Bucket(NamedTuple):
    """What members of one launch have in common."""

    number: int
    """Its place among those that ``bucket_cap_mb`` makes."""
    device: torch.device
    out_dtype: torch.dtype | None
    unit: int | None
    """The module that gathers and frees their parameters as one (FSDP)."""


class Scope(NamedTuple):
    """A running forward of a container, or a ``with group.scope()``."""

    container: Container
    call: FrameType | threading.Lock
    """The frame that runs the container's hooks, or a lock that is held within the ``with``."""
    captured: torch.device | None
    """The device that was being captured into a graph when it was opened."""


class _Record:
    """What was launched in one mode."""

    __slots__ = ("buckets", "launchers", "missed", "slots")

    def __init__(self, members: int) -> None:
        self.slots: list[PythonSlot | None] = [None] * members
        """One for each member that was launched, by the member's index."""
        self.buckets: set[Bucket] = set()
        """Those that had their launch in the scope that is running."""
        self.missed: set[int] = set()
        """Members that were read in a scope and have no slot, or none any more."""
        self.launchers: set[Container] = set()


class ThreadState:
    """The scopes and the slots of one thread."""

    def __init__(self) -> None:
        self.stack: list[Scope] = []
        self.records: dict[Mode, _Record] = {}
        self._refresh: object = None
        self._step: object = None
        """The latest ones when what is in the slots was computed."""
        self._units: set[int] = set()
        """Modules that shard their parameters and whose members were launched."""

    def take(self, member: Member, v: Tensor, g: Tensor) -> Tensor | None:
        """``w`` of a member from its slot or from a launch made now; None: compute it alone."""
        stack = self.stack
        if not stack:
            return None
        roster = member.roster
        mode = current_mode(v, roster.out_dtype(v))
        if mode is None or (mode.capturing and stack[0].captured != v.device):
            return None
        if has_ended(stack[0].call):
            self.close(roster, stack[0].call)
            return None
        refresh, step = roster.latest_refresh, steps.latest
        if self._refresh is not refresh or self._step is not step:
            self.drop()
            self._refresh, self._step = refresh, step
        record = self.records.get(mode)
        slot = None if record is None else record.slots[member.index]
        if slot is not None and (w := slot.take(v, g)) is not None:
            return w
        for scope in stack:
            if member.index in scope.container.members:
                return self._launch(scope.container, member, mode, v, g)
        return None

    def enter(self, container: Container, call: FrameType | threading.Lock) -> None:
        """Open a scope, unless the group is no more."""
        stack = self._close_ended(container.roster)
        if not container.roster.removed:  # asked when the stack was read
            captured = stack[0].captured if stack else captured_device()
            stack.append(Scope(container, call, captured))

    def leave(self, roster: Roster, frame: FrameType) -> None:
        """Close the scope that a frame opened, if it did."""
        stack = self._close_ended(roster)
        if stack and stack[-1].call is frame:
            self._close_last(stack, roster)

    def close(self, roster: Roster, call: FrameType | threading.Lock) -> None:
        """Close the scope of a call, if it is open, and all within it."""
        stack = self.stack
        while any(scope.call is call for scope in stack):
            self._close_last(stack, roster)

    def forget(self) -> None:
        """Close every scope and let go of every slot, from any thread."""
        self.stack = []
        self.records = {}

    def slots(self) -> list[PythonSlot]:
        """The slots that are filled, from any thread."""
        records = list(self.records.values())
        return [slot for record in records for slot in record.slots if slot is not None]

    def drop(self) -> None:
        """Let go of every slot."""
        for mode, record in self.records.items():
            _tell_launchers(mode, record)
        self.records = {}

    def _launch(
        self, container: Container, member: Member, mode: Mode, v: Tensor, g: Tensor
    ) -> Tensor | None:
        """Compute a member and all else in its bucket that the container is likely to read."""
        if not _can_be_launched(v, g) or is_forward_ad():
            return None
        bucket = _bucket_of(member, v, sharding_modules())
        if bucket.unit is not None and not self._is_running(bucket.unit):
            return None
        records = self.records
        if (record := records.get(mode)) is None:
            record = records[mode] = _Record(len(member.roster.members))
        if bucket in record.buckets:
            record.missed.add(member.index)
            return None
        record.buckets.add(bucket)
        slots = record.slots
        if slots[member.index] is not None:  # out of date: a change that no optimizer made
            _tell_launchers(mode, record)
        if bucket.unit is not None:
            self._units.add(bucket.unit)
        likely = container.likely(mode, member.index)
        for index, slot in launch(member.roster, likely, bucket, slots):
            slots[index] = slot
        record.launchers.add(container)  # not if it raised: what was read then says nothing
        own = slots[member.index]
        return None if own is None else own.take(v, g)

    def _close_ended(self, roster: Roster) -> list[Scope]:
        """Close the innermost scopes that are over; returns those that are open."""
        stack = self.stack
        while stack and has_ended(stack[-1].call):
            self._close_last(stack, roster)
        return stack

    def _close_last(self, stack: list[Scope], roster: Roster) -> None:
        """Close the innermost scope. It goes last, so that an interrupt leaves one to be closed."""
        scope = stack[-1]
        if self._units:
            self._close_unit(scope.container)
        if len(stack) == 1:
            for record in self.records.values():
                record.buckets.clear()
            if roster.reuse == "forward" or scope.captured is not None or steps.running():
                self.drop()
        stack.pop()

    def _is_running(self, module: int) -> bool:
        """Whether the forward of a module is one of the scopes (an explicit one is no forward)."""
        return any(
            isinstance(s.call, FrameType) and id(s.container.module()) == module for s in self.stack
        )

    def _close_unit(self, container: Container) -> None:
        """If a container shards its parameters, its slots end with its forward: they are gathered
        anew for the next one, without a trace, and autograd nodes may not outlive that."""
        unit = id(container.module())
        if unit not in self._units:
            return
        for record in self.records.values():
            record.buckets = {bucket for bucket in record.buckets if bucket.unit != unit}
            for index in container.members:
                slot, record.slots[index] = record.slots[index], None
                if slot is not None and slot.taken:
                    record.missed.add(index)
        self._units.remove(unit)


def _tell_launchers(mode: Mode, record: _Record) -> None:
    """Tell the containers which members were read: the next launch covers those."""
    read = {i for i, slot in enumerate(record.slots) if slot is not None and slot.taken}
    read |= record.missed
    record.missed = set()
    for container in record.launchers:
        container.previous[mode] = sorted(read & container.members)


def _can_be_launched(v: Any, g: Any) -> bool:
    """Whether v and g are plain tensors with a version counter."""
    return type(v) in PLAIN and type(g) in PLAIN and not (v.is_inference() or g.is_inference())


def _bucket_of(member: Member, v: Tensor, sharding: tuple[type[nn.Module], ...]) -> Bucket:
    """Where a member belongs at this moment, given :func:`~wnkernel.observers.sharding_modules`."""
    unit = member.innermost(sharding) if sharding else None
    return Bucket(member.bucket, v.device, member.roster.out_dtype(v), unit)


def launch(
    roster: Roster, indices: Iterable[int], bucket: Bucket, present: list[PythonSlot | None]
) -> list[tuple[int, PythonSlot]]:
    """Compute the members among ``indices`` that belong to a bucket and have no slot that is up to
    date: one forward launch, one autograd node.

    Returns:
        Their slots. None at all if a weight has something wrong with it: read alone, it says what.
    """
    if not classes_are_as_made():
        return []
    sharding = sharding_modules()
    simple = not (sharding or roster.autocast)
    chosen, vs, gs, dims, eps = [], [], [], [], []
    for index in indices:
        member = roster.members[index]()
        if member is None or member.bucket != bucket.number:
            continue
        weights = member.weights()
        if weights is None or not weights.is_untouched():
            continue
        v: Any = weights._parameters.get(V)
        g: Any = weights._parameters.get(G)
        if not _can_be_launched(v, g) or v.device != bucket.device:
            continue
        if not simple and _bucket_of(member, v, sharding) != bucket:
            continue
        norm: Any = weights._modules["0"]
        slot = present[index]
        if slot is not None and slot.is_current(v, g):
            continue
        chosen.append(index)
        vs.append(v)
        gs.append(g)
        dims.append(norm.dim)
        eps.append(norm.eps)
    try:
        with _version_counters():
            ws = functional.weight_norms(vs, gs, dims, eps=eps, out_dtype=bucket.out_dtype)
    except (TypeError, ValueError):
        return []
    except RuntimeError:
        if all(map(has_memory, (*vs, *gs))):  # no weight's fault: out of memory, say
            raise
        return []
    return list(zip(chosen, slots(list(ws), vs, gs), strict=True))


def _version_counters() -> AbstractContextManager[object]:
    """Results without gradients in inference mode too, but with a version counter: a write to one
    of them must not go unseen."""
    if not torch.is_inference_mode_enabled():
        return nullcontext()
    stack = ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.no_grad())
    return stack


class Registry:
    """The states that threads have of one group. It keeps none of them alive."""

    def __init__(self) -> None:
        self._states: weakref.WeakValueDictionary[int, ThreadState] = weakref.WeakValueDictionary()

    def add(self, state: ThreadState) -> None:
        """Take in the state of a new thread."""
        self._states[id(state)] = state

    def states(self) -> list[ThreadState]:
        """Those of all threads. They are read in one step, since other threads may come."""
        return [state for ref in self._states.valuerefs() if (state := ref()) is not None]

    def forget(self) -> None:
        """Close every scope and let go of every slot, in all threads."""
        for state in self.states():
            state.forget()


class Threads(threading.local):
    """The state of the thread that asks, and the registry of all of them."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.current = ThreadState()
        registry.add(self.current)


def new_threads() -> Threads:
    """What a roster is made with."""
    return Threads(Registry())


def threads_of(roster: Roster) -> Threads:
    """What a roster was made with."""
    return cast(Threads, roster.threads)
