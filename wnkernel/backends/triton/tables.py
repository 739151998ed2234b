"""What a launch over a list reads: a table of weights, and which of them each program works on.

Both lie on the device, and are kept while every address and size in them stays the same, as is
usual from one training step to the next.
"""

from __future__ import annotations

import struct
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .launch_table import VECTOR_BYTES, Kind, Plan, plan, tiles

HEADER = (*Plan._fields, "first", "first_to_finish", "partials", "eps_bits")
"""Columns that both tables begin with. ``first``: the first program of a weight in each of the two
launches; ``partials``: elements before its partial sums in the workspace."""
FORWARD = (*HEADER, "v", "g", "w", "norm")
BACKWARD = (*HEADER, "grad_w", "v", "g", "norm", "grad_v", "grad_g")
"""Addresses follow; 0 for a gradient that nobody wants."""

FORWARD_PLANES = 2
"""Numbers that a program leaves behind for a part of a row: a sum of squares and its unit."""
BACKWARD_PLANES = 1

KEPT = 64
"""Tables that a thread keeps: several models of a few dtypes, forward and backward."""


class Weight(NamedTuple):
    """One weight of a list: all that its line of a table depends on but its addresses."""

    outer: int
    rows: int
    inner: int
    vector: int
    eps: float


class Table(NamedTuple):
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


def workspace(p: Plan, itemsize: int, planes: int) -> int:
    """Elements of partial sums of one weight, a multiple of what aligns those of the next one."""
    if p.split == 1:
        return 0
    tile = tiles(itemsize)[p.tile]
    used = p.programs * planes * (tile.columns if tile.kind is Kind.SEGMENTS else 1)
    return -(-used // VECTOR_BYTES) * VECTOR_BYTES


def build(weights: Sequence[Weight], itemsize: int, columns: Sequence[str], planes: int) -> Table:
    """Make a table. Weights whose programs take long come first, so that none of those is left to
    run alone at the end.

    Args:
        weights: the list.
        itemsize: bytes of an element of v.
        columns: FORWARD or BACKWARD.
        planes: FORWARD_PLANES or BACKWARD_PLANES.
    """
    plans = [plan(w.outer, w.rows, w.inner, itemsize, w.vector) for w in weights]
    lines: list[tuple[int, ...]] = []
    order = sorted(range(len(plans)), key=lambda k: -plans[k].per_chunk)
    no_addresses = (0,) * (len(columns) - len(HEADER))
    first = first_to_finish = partials = 0
    for k in order:
        p = plans[k]
        eps_bits = bits_of(weights[k].eps)
        lines.append((*p, first, first_to_finish, partials, eps_bits, *no_addresses))
        first += p.programs
        first_to_finish += p.programs if p.split > 1 else 0
        partials += workspace(p, itemsize, planes)
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
