"""What one thread has computed of one group, and how long it may serve it.

A launch computes many members at once and puts each into a slot. With ``reuse="forward"`` slots
live until the outermost scope ends; with ``reuse="version"`` until one shows a change, an optimizer
steps, or someone asks.
"""

from __future__ import annotations

from types import FrameType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..streams import captured_device
from . import batch
from .frames import has_ended
from .modes import Mode, current_mode
from .optimizers import steps
from .slots import PythonSlot

if TYPE_CHECKING:
    from .members import Container, Member, Roster


class Scope(NamedTuple):
    """A running forward of a container, or a ``with group.scope()``."""

    container: Container
    frame: FrameType | None
    """The frame that runs the container's hooks; None where a ``finally`` closes the scope."""
    captured: torch.device | None
    """The device that was being captured into a graph when it was opened."""


class Launches:
    """The scopes and the slots of one thread."""

    def __init__(self) -> None:
        self.stack: list[Scope] = []
        self.tables: dict[Mode, list[PythonSlot | None]] = {}
        """A slot for each member that was launched, by the member's index."""
        self._stamp = 0
        self._launched: set[tuple[Mode, batch.Bucket]] = set()
        """Modes and buckets that had their launch in the scope that is running."""
        self._missed: dict[Mode, set[int]] = {}
        """Members that were read in this scope and have no slot, or none any more."""
        self._launchers: dict[Mode, set[Container]] = {}
        self._units: set[int] = set()
        """Modules that shard their parameters and whose members were launched."""

    def take(self, member: Member, v: Tensor, g: Tensor) -> Tensor | None:
        """``w`` of a member from its slot or from a launch made now; None: compute it alone."""
        if not self.stack:
            return None
        roster = member.roster
        mode = current_mode(v, roster.out_dtype(v))
        if mode is None or (mode.capturing and self.stack[0].captured != v.device):
            return None
        if has_ended(self.stack[0].frame):
            self.cut(roster, 0)
            return None
        stamp = roster.refreshes + steps.count  # both only grow
        if self._stamp != stamp:
            self.drop()
            self._launched.clear()
            self._stamp = stamp
        table = self.tables.get(mode)
        slot = None if table is None else table[member.index]
        if slot is not None and (w := slot.take(v, g)) is not None:
            return w
        for scope in self.stack:
            if member.index in scope.container.members:
                return self._launch(scope.container, member, mode, v, g)
        return None

    def enter(self, container: Container, frame: FrameType | None) -> int:
        """Open a scope; how many were open before."""
        self._close_ended(container.roster)
        captured = self.stack[0].captured if self.stack else captured_device()
        self.stack.append(Scope(container, frame, captured))
        return len(self.stack) - 1

    def leave(self, roster: Roster, frame: FrameType) -> None:
        """Close the scope that a frame opened, if it did."""
        self._close_ended(roster)
        if self.stack and self.stack[-1].frame is frame:
            self._pop(roster)

    def cut(self, roster: Roster, depth: int) -> None:
        """Close all scopes but the outermost ``depth``."""
        while len(self.stack) > depth:
            self._pop(roster)

    def close(self) -> None:
        """Close every scope and let go of every slot."""
        self.stack.clear()
        self._launched.clear()
        self.drop()

    def slots(self) -> list[PythonSlot]:
        """The slots that are filled."""
        return [slot for table in list(self.tables.values()) for slot in table if slot is not None]

    def drop(self) -> None:
        """Let go of every slot."""
        for mode in self.tables:
            self._note_reads(mode)
        self.tables.clear()
        self._launchers.clear()

    def _launch(
        self, container: Container, member: Member, mode: Mode, v: Tensor, g: Tensor
    ) -> Tensor | None:
        """Compute a member and all else in its bucket that the container is likely to read."""
        if not batch.can_be_launched(v, g) or forward_ad._current_level >= 0:
            return None
        bucket = batch.bucket_of(member, v, batch.sharding_modules())
        if bucket.unit is not None and not self._is_running(bucket.unit):
            return None
        if (mode, bucket) in self._launched:
            self._missed.setdefault(mode, set()).add(member.index)
            return None
        self._launched.add((mode, bucket))
        table = self.tables.setdefault(mode, [None] * len(member.roster.members))
        if table[member.index] is not None:  # out of date: a change that no optimizer made
            self._note_reads(mode)
        launchers = self._launchers.setdefault(mode, set())
        if bucket.unit is not None:
            self._units.add(bucket.unit)
        likely = container.likely(mode, member.index)
        for index, slot in batch.launch(member.roster, likely, bucket, table):
            table[index] = slot
        launchers.add(container)  # not if it raised: what was read then says nothing
        slot = table[member.index]
        return None if slot is None else slot.take(v, g)

    def _note_reads(self, mode: Mode) -> None:
        """Tell the containers which members were read: the next launch covers those."""
        read = {i for i, slot in enumerate(self.tables[mode]) if slot is not None and slot.taken}
        read |= self._missed.pop(mode, set())
        for container in self._launchers[mode]:
            container.previous[mode] = sorted(read & container.members)

    def _close_ended(self, roster: Roster) -> None:
        while self.stack and has_ended(self.stack[-1].frame):
            self._pop(roster)

    def _pop(self, roster: Roster) -> None:
        scope = self.stack.pop()
        if self._units:
            self._close_unit(scope.container)
        if not self.stack:
            self._launched.clear()
            if roster.reuse == "forward" or scope.captured is not None or steps.running():
                self.drop()

    def _is_running(self, module: int) -> bool:
        """Whether the forward of a module is one of the scopes (an explicit one is no forward)."""
        return any(s.frame is not None and id(s.container.module()) == module for s in self.stack)

    def _close_unit(self, container: Container) -> None:
        """If a container shards its parameters, its slots end with its forward: they are gathered
        anew for the next one, without a trace, and autograd nodes may not outlive that."""
        unit = id(container.module())
        if unit not in self._units:
            return
        self._units.remove(unit)
        self._launched = {(m, bucket) for m, bucket in self._launched if bucket.unit != unit}
        for mode, table in self.tables.items():
            for index in container.members:
                slot, table[index] = table[index], None
                if slot is not None and slot.taken:
                    self._missed.setdefault(mode, set()).add(index)
