"""From weights to launches: a single weight by its addresses, several by a table."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from ...problem import accumulation_dtype
from ...streams import current_stream, is_capturing
from . import kernels, tables
from .arrays import check_memory
from .device import ELEMENTS, Uploads, warps
from .launch_table import VECTOR_BYTES, Kind, Tile, plan, tiles
from .tables import Kept, Table, Weight, bits_of, build, workspace
from .tile import INTERPRETED


@dataclass(frozen=True, eq=False)
class Direction:
    """A forward or a backward."""

    one: triton.JITFunction
    many: triton.JITFunction
    columns: tuple[str, ...]
    """Of its tables."""
    planes: int


FORWARD = Direction(
    kernels.forward_one, kernels.forward_list, tables.FORWARD, tables.FORWARD_PLANES
)
BACKWARD = Direction(
    kernels.backward_one, kernels.backward_list, tables.BACKWARD, tables.BACKWARD_PLANES
)


LAYOUTS = 1024
"""Lists that a thread remembers, whatever their addresses. Weights alone count too: a model has up
to a hundred of different shapes."""


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

    Most models have rows for tiles only. The other kinds take more registers, up to 128, and a
    kernel has as many for all of its branches as for the worst.
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


class Batch:
    """What is launched together, but for addresses: weights of the same dtypes on one device, in
    one direction. Tables are kept for this object."""

    def __init__(
        self, direction: Direction, types: Types, weights: Sequence[Weight], device: torch.device
    ) -> None:
        self.direction, self.types, self.device = direction, types, device
        self.weights = weights
        self.is_list = len(weights) > 1

    @cached_property
    def table(self) -> Table:
        """Of a list."""
        itemsize = self.types.v.itemsize
        return build(self.weights, itemsize, self.direction.columns, self.direction.planes)

    @cached_property
    def single(self) -> Single:
        """Of a weight alone."""
        (w,), t = self.weights, self.types
        p = plan(w.outer, w.rows, w.inner, t.v.itemsize, w.vector)
        tile = tiles(t.v.itemsize)[p.tile]
        choices = [choices_of_one(t, tile, finish) for finish in range(2 if p.split > 1 else 1)]
        partials = workspace(p, t.v.itemsize, self.direction.planes)
        return Single(p.programs, (bits_of(w.eps), *p[1:-1]), partials, choices)


class Single(NamedTuple):
    """The launches of a weight alone."""

    programs: int
    sizes: tuple[int, ...]
    """What kernels are told after all addresses."""
    workspace: int
    choices: list[dict[str, Any]]
    """For each launch."""


class Launcher:
    """Launches, and what has to outlive them."""

    def __init__(self) -> None:
        self.variants: set[tuple[object, ...]] = set()
        """What was compiled by this process."""
        self.layouts = Kept(LAYOUTS)
        """What the backend knows of lists."""
        self._compiled: dict[tuple[object, ...], CompiledKernel] = {}
        self._tables = Kept()
        self._owners = Kept()
        self._uploads = Uploads()
        self._lock = threading.Lock() if INTERPRETED.value else nullcontext()

    def launch(
        self,
        batch: Batch,
        addresses: Sequence[Sequence[int]],
        inputs: Mapping[str, Sequence[Tensor]],
        *,
        keep: bool = True,
    ) -> None:
        """Run one direction for the weights of a batch, whose device is the current one.

        Args:
            batch: what to run.
            addresses: those of all weights, for each array that the kernels take.
            inputs: tensors by name. They are checked for memory unless all addresses are those of a
                table that is kept: where memory was freed, the address is another.
            keep: whether tables on the device may be kept.

        Raises:
            RuntimeError: a tensor has no memory.
        """
        if batch.is_list:
            self._launch_list(batch, addresses, inputs, keep)
        else:
            check_memory(inputs)
            self._launch_one(batch, [column[0] for column in addresses])

    def _launch_one(self, batch: Batch, addresses: Sequence[int]) -> None:
        one = batch.single
        partials = _workspace(one.workspace, batch)
        args = (*addresses, _address(partials), *one.sizes)
        for choices in one.choices:
            self._run(batch.direction.one, one.programs, args, choices, batch.device)

    def _launch_list(
        self,
        batch: Batch,
        addresses: Sequence[Sequence[int]],
        inputs: Mapping[str, Sequence[Tensor]],
        keep: bool,
    ) -> None:
        table, t, many, device = batch.table, batch.types, batch.direction.many, batch.device
        lines, owners = self._uploaded(batch, addresses, inputs, keep)
        partials = _workspace(table.workspace, batch)
        args = (lines.data_ptr(), owners.data_ptr(), _address(partials))
        self._run(many, table.programs, args, choices_of_list(t, table.rows_only, 0), device)
        if table.programs_to_finish:
            args = (args[0], args[1] + 8 * table.programs, args[2])
            self._run(many, table.programs_to_finish, args, choices_of_list(t, False, 1), device)

    def _uploaded(
        self,
        batch: Batch,
        addresses: Sequence[Sequence[int]],
        inputs: Mapping[str, Sequence[Tensor]],
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        """The table of a list on its device: lines with addresses, and owners."""
        table, device = batch.table, batch.device

        def lines() -> Tensor:
            check_memory(inputs)
            return self._uploads.copy(table.at(addresses), device)

        def owners() -> Tensor:
            self._uploads.expect(table.lines.numel() + table.owners.numel())
            return self._uploads.copy(table.owners, device)

        capturing = is_capturing(device)
        if not capturing:
            self._uploads.refill(device)
        if capturing or not keep:  # a table from outside may be gone when a graph runs
            return lines(), self._uploads.copy(table.owners, device)
        place = batch, current_stream(device)
        found = self._tables.get((*place, *map(tuple, addresses)), lines)
        return found, self._owners.get(place, owners)

    def _run(
        self,
        kernel: triton.JITFunction,
        programs: int,
        args: Sequence[int],
        choices: dict[str, Any],
        device: torch.device,
    ) -> None:
        """Launch. Triton's own way through binds and specialises the arguments of every call, which
        takes five times as long as to launch what it compiled; nothing is specialised on here."""
        key = (kernel, device, *choices.values())
        compiled = self._compiled.get(key)
        if compiled is not None:
            _launch_again(compiled, programs, (*args, *choices.values()))
            return
        self.variants.add(key)
        with self._lock:
            compiled = kernel[(programs,)](*args, **choices, num_warps=warps(device))
        if isinstance(compiled, CompiledKernel):
            self._compiled[key] = compiled


def _launch_again(compiled: CompiledKernel, programs: int, args: Sequence[object]) -> None:
    """Launch what was launched before: by way of Triton where hooks listen to launches, as those of
    profilers do. Triton gathers what they are told for chains without any hook, too."""
    runtime = triton.knobs.runtime
    if _listens(runtime.launch_enter_hook) or _listens(runtime.launch_exit_hook):
        compiled[programs, 1, 1](*args)
        return
    driver = triton.runtime.driver.active
    stream = driver.get_current_stream(driver.get_current_device())
    run = compiled.run  # loads the kernel, if need be
    what = compiled.function, compiled.packed_metadata
    run(programs, 1, 1, stream, *what, None, None, None, *args)


def _listens(hook: object) -> bool:
    """Whether there is a hook: a function (in Triton 3.4), or a chain that is not empty."""
    return bool(getattr(hook, "calls", hook))


def _workspace(elements: int, batch: Batch) -> Tensor | None:
    if elements == 0:
        return None
    dtype = accumulation_dtype(batch.types.v)
    return torch.empty(elements, dtype=dtype, device=batch.device)


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
