"""The data that kernels for lists read: a table with a line for each weight, and which line each
program reads.

Both are made on the CPU and copied to the device. They are kept there and used again if all
addresses and sizes in them are the same, as is usual from one training step to the next.
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

HEADER = (*Plan._fields, "first", "first_to_finish", "partials", "eps_bits", "forced_bits")
"""The first columns of the tables of both directions. ``first`` and ``first_to_finish`` are the
numbers of a weight's first program in the two launches. ``partials`` is the number of elements
before the weight's partial sums in the workspace. A backward does not read ``forced_bits``."""


@dataclass(frozen=True, eq=False)
class Direction:
    """The forward or the backward."""

    columns: tuple[str, ...]
    """The columns of a table: the header, and then addresses. The address of a gradient that is not
    needed is 0."""
    planes: int
    """How many numbers a program stores for its part of a split row."""


FORWARD = Direction((*HEADER, "v", "g", "w", "norm"), 2)
"""The forward, where a program stores a sum of squares and the unit of that sum."""
BACKWARD = Direction((*HEADER, "grad_w", "v", "g", "norm", "grad_v", "grad_g"), 1)

KEPT = 64
"""The number of tables that a thread keeps. They are enough for several models of a few dtypes,
forward and backward."""

RESERVE = 1 << 17
"""The smallest reserve of pinned memory, in int64 numbers: 1 MiB."""

CAPTURES = 4
"""The reserve is large enough to capture everything that this process launches this many times in a
row."""

MOST = 1 << 23
"""The most int64 numbers that are kept ready in the reserve: 64 MiB."""


class Weight(NamedTuple):
    """One weight of a list. Its line of a table follows from these fields and its addresses."""

    outer: int
    rows: int
    inner: int
    vector: int
    eps: float
    forced: float = 0.0


@dataclass(frozen=True, eq=False)
class Table:
    """The table of a list on the CPU, still without addresses."""

    lines: Tensor
    """An int64 tensor with a line for each weight, in the order of ``order``. Addresses are 0."""
    order: Tensor
    line_of: Tensor
    """An int64 tensor with the line of each program of the first launch, then of the second."""
    programs: int
    """The programs of the first launch."""
    programs_to_finish: int
    """The programs of the second launch; 0 if no weight is split."""
    workspace: int
    """The elements of the workspace for partial sums."""
    rows_only: bool
    """Whether all tiles are of Kind.ROWS."""

    def at(self, addresses: Sequence[Sequence[int]]) -> Tensor:
        """Return the lines with ``addresses``: for each array, the addresses of all weights."""
        lines = self.lines.clone()
        numbers = array("q", chain.from_iterable(addresses))
        columns = torch.frombuffer(numbers, dtype=torch.int64).view(len(addresses), -1)
        lines[:, len(HEADER) :] = columns.t()[self.order]
        return lines


def bits_of(x: float) -> int:
    """Return the bits of a float64 as an integer. Triton would pass a float argument as float32."""
    return struct.unpack("<q", struct.pack("<d", x))[0] if x else 0


def workspace(p: Plan, itemsize: int, direction: Direction) -> int:
    """Return the elements of the workspace that one weight takes, rounded up so that the partial
    sums of the next weight are aligned."""
    if p.split == 1:
        return 0
    tile = tiles(itemsize)[p.tile]
    used = p.programs * direction.planes * (tile.columns if tile.kind is Kind.STRIPS else 1)
    return -(-used // VECTOR_BYTES) * VECTOR_BYTES


def build(weights: Sequence[Weight], itemsize: int, direction: Direction) -> Table:
    """Make the table of a list. Weights with long-running programs come first, so that no such
    program runs alone at the end.

    Args:
        weights: the weights of the list.
        itemsize: the bytes of an element of v.
        direction: FORWARD or BACKWARD.
    """
    plans = [plan(w.outer, w.rows, w.inner, itemsize, w.vector) for w in weights]
    lines: list[tuple[int, ...]] = []
    order = sorted(range(len(plans)), key=lambda k: -plans[k].per_chunk)
    no_addresses = (0,) * (len(direction.columns) - len(HEADER))
    first = first_to_finish = partials = 0
    for k in order:
        p = plans[k]
        numbers = bits_of(weights[k].eps), bits_of(weights[k].forced)
        lines.append((*p, first, first_to_finish, partials, *numbers, *no_addresses))
        first += p.programs
        first_to_finish += p.programs if p.split > 1 else 0
        partials += workspace(p, itemsize, direction)
    programs = _numbers([plans[k].programs for k in order])
    to_finish = _numbers([plans[k].programs if plans[k].split > 1 else 0 for k in order])
    place = torch.arange(len(plans), device="cpu")
    line_of = place.repeat_interleave(programs), place.repeat_interleave(to_finish)
    choices = tiles(itemsize)
    rows_only = all(choices[p.tile].kind is Kind.ROWS for p in plans)
    counts = first, first_to_finish, partials
    return Table(_numbers(lines), _numbers(order), torch.cat(line_of), *counts, rows_only)


def _numbers(values: Sequence[int] | Sequence[tuple[int, ...]]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")


class Kept(threading.local):
    """Keeps the values that this thread used last."""

    def __init__(self, most: int = KEPT) -> None:
        self._most = most
        self._kept: OrderedDict[object, Any] = OrderedDict()

    def get(self, key: object, make: Callable[[], Any]) -> Any:
        """Return the value of a key. A value that is not kept is made now."""
        found = self._kept.get(key)
        if found is None:
            found = self._kept[key] = make()
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(key)
        return found


class Uploads:
    """Copies CPU tensors to devices through pinned memory, so that the CPU does not wait.

    torch uses pinned memory again only after the copy from it is done. But a captured copy reads
    its pinned memory at every replay, and nothing tells when the graph is deleted. So captured
    copies take their memory from a reserve, no part of which is used twice. The reserve is
    allocated outside of captures, because older versions of torch cannot allocate pinned memory
    during a capture.
    """

    def __init__(self) -> None:
        self._reserve: list[Tensor] = []
        self._left = 0
        self._wanted = RESERVE // 2
        self._expected: deque[int] = deque(maxlen=64)
        self._lock = threading.Lock()

    def expect(self, numbers: int) -> None:
        """Announce that captures will take ``numbers`` more numbers."""
        with self._lock:
            self._expected.append(numbers)
            self._wanted = max(RESERVE // 2, min(CAPTURES * sum(self._expected), MOST))

    def refill(self, device: torch.device) -> None:
        """Fill up the reserve if little is left. Every launch outside of captures calls this,
        because a capture may follow."""
        if self._left >= self._wanted or device.type == "cpu":
            return
        with self._lock:
            if self._left < self._wanted:
                self._add(2 * self._wanted)

    def copy(self, memory: Tensor, device: torch.device) -> Tensor:
        """Return a copy of ``memory`` (int64, contiguous) on a device."""
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
