"""From weights to launches: a single weight by its addresses, several by a table."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...problem import accumulation_dtype
from ...streams import current_stream, guard, is_capturing
from . import kernels
from .device import ELEMENTS, Uploads, warps
from .launch_table import VECTOR_BYTES, Kind, Tile, plan, tiles
from .tables import (
    BACKWARD_PLANES,
    FORWARD_PLANES,
    Table,
    Tables,
    Weight,
    bits_of,
    build,
    workspace,
)
from .tile import INTERPRETED


class Direction(NamedTuple):
    """A forward or a backward."""

    one: triton.JITFunction
    many: triton.JITFunction
    planes: int


FORWARD = Direction(kernels.forward_one, kernels.forward_list, FORWARD_PLANES)
BACKWARD = Direction(kernels.backward_one, kernels.backward_list, BACKWARD_PLANES)


class Types(NamedTuple):
    """What a launch has in common. W is the dtype of w and of grad_w."""

    v: torch.dtype
    g: torch.dtype
    w: torch.dtype

    @property
    def vector(self) -> int:
        """Elements of the widest access to v."""
        return VECTOR_BYTES // self.v.itemsize


@cache
def _types_of(t: Types) -> dict[str, Any]:
    named = {"V": t.v, "G": t.g, "W": t.w, "ACC": accumulation_dtype(t.v)}
    return {name: ELEMENTS[dtype] for name, dtype in named.items()}


@cache
def choices_of_one(t: Types, tile: Tile, finish: int) -> dict[str, Any]:
    """Compile-time arguments for a single weight."""
    vector = t.vector if tile.aligned else 1
    return _types_of(t) | {
        "KIND": int(tile.kind), "LINES": tile.lines, "COLUMNS": tile.columns,
        "VECTOR": vector, "FINISH": finish,
    }  # fmt: skip


@cache
def choices_of_list(t: Types, rows_only: bool, finish: int) -> dict[str, Any]:
    """Compile-time arguments for a list: every tile that it may need is in them.

    Most models have rows for tiles only. The other kinds take twice the registers, and a kernel has
    as many for all of its branches as for the worst.
    """
    every = tiles(t.v.itemsize)
    needed = [k for k in every if k.kind is Kind.ROWS] if rows_only else every  # rows come first
    return _types_of(t) | {
        "TILES": tuple((int(k.kind), k.lines, k.columns, int(k.aligned)) for k in needed),
        "COUNT": len(needed),
        "VECTOR": t.vector,
        "FINISH": finish,
    }


def most_variants() -> int:
    """Variants that one combination of dtypes can come to."""
    every = tiles(torch.float32.itemsize)
    split = sum(k.kind is not Kind.ROWS for k in every)
    of_one, of_list = len(every) + split, 3
    return 2 * (of_one + of_list)


class Launcher:
    """Launches, and what has to outlive them."""

    def __init__(self) -> None:
        self.variants: set[tuple[object, ...]] = set()
        """What was compiled by this process."""
        self._tables = Tables()
        self._uploads = Uploads()
        self._lock = threading.Lock() if INTERPRETED.value else nullcontext()

    def launch(
        self, direction: Direction, t: Types, weights: Sequence[Weight], device: torch.device
    ) -> None:
        """Run one direction for weights of the same dtypes on one device."""
        with guard(device):
            if len(weights) == 1:
                self._launch_one(direction, t, weights[0], device)
            else:
                self._launch_list(direction, t, weights, device)

    def _launch_one(self, direction: Direction, t: Types, w: Weight, device: torch.device) -> None:
        p = plan(w.outer, w.rows, w.inner, t.v.itemsize, w.vector)
        tile = tiles(t.v.itemsize)[p.tile]
        partials = _workspace(workspace(p, t.v.itemsize, direction.planes), t, device)
        args = (*w.addresses, _address(partials), bits_of(w.eps), *p[1:-1])
        for finish in range(2 if p.split > 1 else 1):
            self._run(direction.one, p.programs, args, choices_of_one(t, tile, finish), device)

    def _launch_list(
        self, direction: Direction, t: Types, weights: Sequence[Weight], device: torch.device
    ) -> None:
        table = self._table(direction, t, tuple(weights), device)
        partials = _workspace(table.workspace, t, device)
        owners = table.memory.data_ptr() + 8 * table.lines
        args = (table.memory.data_ptr(), owners, _address(partials))
        choices = choices_of_list(t, table.rows_only, 0)
        self._run(direction.many, table.programs, args, choices, device)
        if table.programs_to_finish:
            args = (args[0], owners + 8 * table.programs, args[2])
            choices = choices_of_list(t, False, 1)
            self._run(direction.many, table.programs_to_finish, args, choices, device)

    def _table(
        self, direction: Direction, t: Types, weights: tuple[Weight, ...], device: torch.device
    ) -> Table:
        def make() -> Table:
            table = build(weights, t.v.itemsize, direction.planes)
            return table._replace(memory=self._uploads.copy(table.memory, device))

        if is_capturing(device):  # a table from outside may be gone when the graph runs
            return make()
        return self._tables.get((direction, t, device, current_stream(device), weights), make)

    def _run(
        self,
        kernel: triton.JITFunction,
        programs: int,
        args: Sequence[int],
        choices: dict[str, Any],
        device: torch.device,
    ) -> None:
        self.variants.add((kernel, device, *choices.values()))
        with self._lock:
            kernel[(programs,)](*args, **choices, num_warps=warps(device))


def _workspace(elements: int, t: Types, device: torch.device) -> Tensor | None:
    if elements == 0:
        return None
    return torch.empty(elements, dtype=accumulation_dtype(t.v), device=device)


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
