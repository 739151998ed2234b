"""What a launch over a list reads: a table of weights, and which of them each program works on.

Both are made on the CPU and copied to the device. They are kept there while every address and size
in them stays the same, as is usual from one training step to the next.
"""

from __future__ import annotations

import struct
import threading
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...streams import is_capturing
from .plan import VECTOR_BYTES, Kind, Plan, plan, tiles

HEADER = (*Plan._fields, "first", "first_to_finish", "partials", "eps_bits")
"""Columns that both tables begin with. ``first``: the first program of a weight in each of the two
launches; ``partials``: elements before its partial sums in the workspace."""


@dataclass(frozen=True, eq=False)
class Direction:
    """A forward or a backward."""

    columns: tuple[str, ...]
    """Of its tables: the header, and addresses, 0 for a gradient that nobody wants."""
    planes: int
    """Numbers that a program leaves behind for a part of a row."""


FORWARD = Direction((*HEADER, "v", "g", "w", "norm"), 2)
"""A program leaves a sum of squares and its unit behind."""
BACKWARD = Direction((*HEADER, "grad_w", "v", "g", "norm", "grad_v", "grad_g"), 1)

KEPT = 64
"""Tables that a thread keeps: several models of a few dtypes, forward and backward."""

RESERVE = 1 << 17
"""Numbers in a reserve of pinned memory at least: 1 MiB."""

CAPTURES = 4
"""Captures of everything that this process launches, for which the reserve lasts without another
launch in between."""

MOST = 1 << 23
"""Numbers that are kept ready at most: 64 MiB."""


class Weight(NamedTuple):
    """One weight of a list: all that its line of a table depends on but its addresses."""

    outer: int
    rows: int
    inner: int
    vector: int
    eps: float


@dataclass(frozen=True, eq=False)
class Table:
    """A list on the CPU, ready for its addresses."""

    lines: Tensor
    """int64, a line for each weight, in the order of ``order``; 0 for addresses."""
    order: Tensor
    owners: Tensor
    """int64, the weight of each program of the first launch, then of the second."""
    programs: int
    """Of the first launch."""
    programs_to_finish: int
    """Of the second; 0 where nothing is split."""
    workspace: int
    """Elements of partial sums."""
    rows_only: bool
    """Whether all tiles are of Kind.ROWS."""

    def at(self, addresses: Sequence[Sequence[int]]) -> Tensor:
        """The lines with the addresses of each array of all weights."""
        lines = self.lines.clone()
        numbers = array("q", chain.from_iterable(addresses))
        columns = torch.frombuffer(numbers, dtype=torch.int64).view(len(addresses), -1)
        lines[:, len(HEADER) :] = columns.t()[self.order]
        return lines


def bits_of(x: float) -> int:
    """A float64 as an integer: Triton takes float arguments as float32."""
    return struct.unpack("<q", struct.pack("<d", x))[0] if x else 0


def workspace(p: Plan, itemsize: int, direction: Direction) -> int:
    """Elements of partial sums of one weight, a multiple of what aligns those of the next one."""
    if p.split == 1:
        return 0
    tile = tiles(itemsize)[p.tile]
    used = p.programs * direction.planes * (tile.columns if tile.kind is Kind.STRIPS else 1)
    return -(-used // VECTOR_BYTES) * VECTOR_BYTES


def build(weights: Sequence[Weight], itemsize: int, direction: Direction) -> Table:
    """Make a table. Weights whose programs take long come first, so that none of those is left to
    run alone at the end.

    Args:
        weights: the list.
        itemsize: bytes of an element of v.
        direction: FORWARD or BACKWARD.
    """
    plans = [plan(w.outer, w.rows, w.inner, itemsize, w.vector) for w in weights]
    lines: list[tuple[int, ...]] = []
    order = sorted(range(len(plans)), key=lambda k: -plans[k].per_chunk)
    no_addresses = (0,) * (len(direction.columns) - len(HEADER))
    first = first_to_finish = partials = 0
    for k in order:
        p = plans[k]
        eps_bits = bits_of(weights[k].eps)
        lines.append((*p, first, first_to_finish, partials, eps_bits, *no_addresses))
        first += p.programs
        first_to_finish += p.programs if p.split > 1 else 0
        partials += workspace(p, itemsize, direction)
    programs = _numbers([plans[k].programs for k in order])
    to_finish = _numbers([plans[k].programs if plans[k].split > 1 else 0 for k in order])
    place = torch.arange(len(plans), device="cpu")
    owners = place.repeat_interleave(programs), place.repeat_interleave(to_finish)
    choices = tiles(itemsize)
    rows_only = all(choices[p.tile].kind is Kind.ROWS for p in plans)
    counts = first, first_to_finish, partials
    return Table(_numbers(lines), _numbers(order), torch.cat(owners), *counts, rows_only)


def _numbers(values: Sequence[int] | Sequence[tuple[int, ...]]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")


class Kept(threading.local):
    """What this thread used last, of one kind."""

    def __init__(self, most: int = KEPT) -> None:
        self._most = most
        self._kept: OrderedDict[object, Any] = OrderedDict()

    def get(self, key: object, make: Callable[[], Any]) -> Any:
        """What belongs to a key, made now if need be."""
        found = self._kept.get(key)
        if found is None:
            found = self._kept[key] = make()
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(key)
        return found


class Uploads:
    """Copies of CPU memory to devices, from pinned memory, so that nothing waits.

    torch keeps pinned memory from being used again before a copy from it is done. A captured copy
    reads it at every replay instead, and nobody says when the graph is gone; so what is captured
    comes from a reserve that is never used again. The reserve is made outside of captures, in which
    older torch cannot allocate pinned memory.
    """

    def __init__(self) -> None:
        self._reserve: list[Tensor] = []
        self._left = 0
        self._wanted = RESERVE // 2
        self._expected: deque[int] = deque(maxlen=64)
        self._lock = threading.Lock()

    def expect(self, numbers: int) -> None:
        """Captures are going to take so many numbers more than was said before."""
        with self._lock:
            self._expected.append(numbers)
            self._wanted = max(RESERVE // 2, min(CAPTURES * sum(self._expected), MOST))

    def refill(self, device: torch.device) -> None:
        """See to the reserve. Called at every launch outside of captures, in case one follows."""
        if self._left >= self._wanted or device.type == "cpu":
            return
        with self._lock:
            if self._left < self._wanted:
                self._add(2 * self._wanted)

    def copy(self, memory: Tensor, device: torch.device) -> Tensor:
        """A copy of ``memory`` (int64, contiguous) on a device."""
        if device.type == "cpu":
            return memory
        if is_capturing(device):
            pinned = self._take(memory.numel()).view(memory.shape).copy_(memory)
        else:
            pinned = memory.pin_memory()
        return pinned.to(device, non_blocking=True)

    def _take(self, numbers: int) -> Tensor:
        with self._lock:
            if self._left < numbers:
                self._add(max(numbers, RESERVE))
            start = self._reserve[-1].numel() - self._left
            self._left -= numbers
            return self._reserve[-1][start : start + numbers]

    def _add(self, numbers: int) -> None:
        pinned = torch.empty(numbers, dtype=torch.int64, device="cpu", pin_memory=True)
        self._reserve.append(pinned)
        self._left = numbers
