"""The weights of one group that one thread has computed: how it computes them and when it drops
them.

A launch computes many members at once and puts each into a slot. With ``reuse="forward"`` slots
live until the outermost scope ends; with ``reuse="version"`` until a slot shows a change, an
optimizer steps, or :meth:`WeightNormGroup.refresh` is called.

Only the thread itself changes the contents of its :class:`ThreadState`, and an interrupt may come
at any bytecode. Other threads replace the stack and the records by empty ones
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

from ..forcing import weights_of
from ..observers import PLAIN, has_memory, is_forward_ad, sharding_modules
from ..parametrization import classes_are_as_made
from ..streams import captured_device
from .members import Container, Member, Roster
from .running import has_ended, steps
from .slots import Mode, PythonSlot, current_mode, slots


class Bucket(NamedTuple):
    """The properties that all members of one launch share."""

    number: int
    """The number of the bucket among those that ``bucket_cap_mb`` makes."""
    device: torch.device
    out_dtype: torch.dtype | None
    unit: int | None
    """The ``id`` of the module that gathers and frees their parameters together (FSDP), or None."""


class Scope(NamedTuple):
    """A running forward of a container, or a ``with group.scope()``."""

    container: Container
    call: FrameType | threading.Lock
    """The frame that runs the container's hooks, or a lock that is held within the ``with``."""
    captured: torch.device | None
    """The device that was being captured into a graph when the scope was opened."""


class _Record:
    """The launches that were made in one mode."""

    __slots__ = ("buckets", "launchers", "missed", "slots")

    def __init__(self, members: int) -> None:
        self.slots: list[PythonSlot | None] = [None] * members
        """The slot of each member that was launched, by the member's index."""
        self.buckets: set[Bucket] = set()
        """The buckets that had their launch in the outermost scope that is open."""
        self.missed: set[int] = set()
        """The indices of members that were read in a scope and have no slot, or no longer have
        one."""
        self.launchers: set[Container] = set()


class ThreadState:
    """The scopes and the slots of one thread."""

    def __init__(self) -> None:
        self.stack: list[Scope] = []
        self.records: dict[Mode, _Record] = {}
        self._refresh: object = None
        self._step: object = None
        """``_refresh`` and ``_step`` hold ``latest_refresh`` of the group and ``latest`` of the
        steps, as they were when the slots were computed."""
        self._units: set[int] = set()
        """The ``id`` of each module that shards its parameters and whose members were launched."""

    def take(self, member: Member, v: Tensor, g: Tensor) -> Tensor | None:
        """Return ``w`` of a member from its slot or from a new launch; None if it must be computed
        alone."""
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
        """Open a scope, unless the group has been removed."""
        stack = self._close_ended(container.roster)
        if not container.roster.removed:  # checked after the stack was read
            captured = stack[0].captured if stack else captured_device()
            stack.append(Scope(container, call, captured))

    def leave(self, roster: Roster, frame: FrameType) -> None:
        """Close the scope that a frame opened, if it opened one."""
        stack = self._close_ended(roster)
        if stack and stack[-1].call is frame:
            self._close_last(stack, roster)

    def close(self, roster: Roster, call: FrameType | threading.Lock) -> None:
        """Close the scope of a call, if it is open, and all scopes inside it."""
        stack = self.stack
        while any(scope.call is call for scope in stack):
            self._close_last(stack, roster)

    def forget(self) -> None:
        """Close every scope and drop every slot. Any thread may call this."""
        self.stack = []
        self.records = {}

    def slots(self) -> list[PythonSlot]:
        """The slots that are filled. Any thread may call this."""
        records = list(self.records.values())
        return [slot for record in records for slot in record.slots if slot is not None]

    def drop(self) -> None:
        """Drop every slot."""
        for mode, record in self.records.items():
            _tell_launchers(mode, record)
        self.records = {}

    def _launch(
        self, container: Container, member: Member, mode: Mode, v: Tensor, g: Tensor
    ) -> Tensor | None:
        """Compute a member together with all others of its bucket that the container is likely to
        read."""
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
        if slots[member.index] is not None:  # it is out of date, but no optimizer has stepped
            _tell_launchers(mode, record)
        if bucket.unit is not None:
            self._units.add(bucket.unit)
        likely = container.likely(mode, member.index)
        for index, slot in launch(member.roster, likely, bucket, slots):
            slots[index] = slot
        record.launchers.add(container)  # not after an error, when the reads tell nothing
        own = slots[member.index]
        return None if own is None else own.take(v, g)

    def _close_ended(self, roster: Roster) -> list[Scope]:
        """Close the innermost scopes that have ended, and return the scopes that are open."""
        stack = self.stack
        while stack and has_ended(stack[-1].call):
            self._close_last(stack, roster)
        return stack

    def _close_last(self, stack: list[Scope], roster: Roster) -> None:
        """Close the innermost scope. It leaves the stack last, so that it is closed again after an
        interrupt."""
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
        """Whether a scope is the forward of the module with this ``id``; ``with group.scope()`` is
        none."""
        return any(
            isinstance(s.call, FrameType) and id(s.container.module()) == module for s in self.stack
        )

    def _close_unit(self, container: Container) -> None:
        """Drop the slots of a container that shards its parameters, at the end of its forward. The
        parameters are gathered again for the next forward, but they do not show this, and autograd
        nodes may not be used after that."""
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
    """Tell the containers which members were read, so that the next launch computes those."""
    read = {i for i, slot in enumerate(record.slots) if slot is not None and slot.taken}
    read |= record.missed
    record.missed = set()
    for container in record.launchers:
        container.previous[mode] = sorted(read & container.members)


def _can_be_launched(v: Any, g: Any) -> bool:
    """Whether v and g are plain tensors with a version counter."""
    return type(v) in PLAIN and type(g) in PLAIN and not (v.is_inference() or g.is_inference())


def _bucket_of(member: Member, v: Tensor, sharding: tuple[type[nn.Module], ...]) -> Bucket:
    """The bucket of a member now, given :func:`~wnkernel.observers.sharding_modules`."""
    unit = member.innermost(sharding) if sharding else None
    return Bucket(member.bucket, v.device, member.roster.out_dtype(v), unit)


def launch(
    roster: Roster, indices: Iterable[int], bucket: Bucket, present: list[PythonSlot | None]
) -> list[tuple[int, PythonSlot]]:
    """Compute the members among ``indices`` that belong to a bucket and have no slot that is up to
    date, with one forward launch and one autograd node.

    Returns:
        The slots by index. There are none if a weight is wrong; a read of it alone raises the
        error.
    """
    if not classes_are_as_made():
        return []
    sharding = sharding_modules()
    simple = not (sharding or roster.autocast)
    chosen, inputs = [], []
    for index in indices:
        member = roster.members[index]()
        if member is None or member.bucket != bucket.number:
            continue
        weights = member.weights()
        if weights is None or not weights.is_untouched():
            continue
        try:
            terms = weights.terms()
        except (TypeError, ValueError):
            continue
        v, g = terms.v, terms.g
        if not _can_be_launched(v, g) or v.device != bucket.device:
            continue
        if not simple and _bucket_of(member, v, sharding) != bucket:
            continue
        slot = present[index]
        if slot is not None and slot.is_current(v, g):
            continue
        chosen.append(index)
        inputs.append(terms)
    vs, gs = [terms.v for terms in inputs], [terms.g for terms in inputs]
    try:
        with _version_counters():
            ws = weights_of(inputs, bucket.out_dtype)
    except (TypeError, ValueError):
        return []
    except RuntimeError:
        if all(map(has_memory, (*vs, *gs))):  # not the weights' fault, e.g. no memory
            raise
        return []
    return list(zip(chosen, slots(list(ws), vs, gs), strict=True))


def _version_counters() -> AbstractContextManager[object]:
    """A context that leaves inference mode and disables gradients, if inference mode is on. Results
    have a version counter there, so that no write to them goes unseen."""
    if not torch.is_inference_mode_enabled():
        return nullcontext()
    stack = ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.no_grad())
    return stack


class Registry:
    """The states of all threads for one group. The registry keeps no state alive."""

    def __init__(self) -> None:
        self._states: weakref.WeakValueDictionary[int, ThreadState] = weakref.WeakValueDictionary()

    def add(self, state: ThreadState) -> None:
        """Add the state of a new thread."""
        self._states[id(state)] = state

    def states(self) -> list[ThreadState]:
        """The states of all threads. They are read in one step, since other threads may add
        theirs."""
        return [state for ref in self._states.valuerefs() if (state := ref()) is not None]

    def forget(self) -> None:
        """Close every scope and drop every slot, in all threads."""
        for state in self.states():
            state.forget()


class Threads(threading.local):
    """The state of the current thread, and the registry of the states of all threads."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.current = ThreadState()
        registry.add(self.current)


def new_threads() -> Threads:
    """Make the thread states for a new roster."""
    return Threads(Registry())


def threads_of(roster: Roster) -> Threads:
    """The thread states of a roster, as :func:`new_threads` made them."""
    return cast(Threads, roster.threads)
