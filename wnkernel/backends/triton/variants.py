"""The variants of kernels that Triton compiles: one for each choice of dtypes, tiles and launch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from triton.compiler import CompiledKernel

from ...problem import accumulation_dtype
from . import kernels
from .plan import THREADS, VECTOR_BYTES, Kind, Tile, tiles
from .tables import BACKWARD, FORWARD, Direction
from .tile import INTERPRETED

OF_ONE = {FORWARD: kernels.forward_one, BACKWARD: kernels.backward_one}
OF_LIST = {FORWARD: kernels.forward_list, BACKWARD: kernels.backward_list}

ELEMENTS = {
    torch.float16: triton.language.float16,
    torch.bfloat16: triton.language.bfloat16,
    torch.float32: triton.language.float32,
    torch.float64: triton.language.float64,
}

_one_at_a_time = threading.Lock() if INTERPRETED.value else nullcontext()
"""The lock of Triton's interpreter, which can run only one kernel at a time."""


class Types(NamedTuple):
    """The dtypes that all weights of a launch share. ``w`` is the dtype of w and of grad_w."""

    v: torch.dtype
    g: torch.dtype
    w: torch.dtype

    @property
    def vector(self) -> int:
        """The number of elements in the widest access to v."""
        return VECTOR_BYTES // self.v.itemsize


class Variant:
    """A kernel with its compile-time choices, for one device."""

    def __init__(
        self, kernel: triton.JITFunction, t: Types, choices: dict[str, Any], device: torch.device
    ) -> None:
        dtypes = {"V": t.v, "G": t.g, "W": t.w, "ACC": accumulation_dtype(t.v)}
        self.kernel, self.device = kernel, device
        self.choices = {name: ELEMENTS[dtype] for name, dtype in dtypes.items()} | choices
        self._values = tuple(self.choices.values())
        self._compiled: CompiledKernel | None = None

    def launch(self, programs: int, args: Sequence[int]) -> None:
        """Launch the variant on its device, which must be the current one.

        Triton's own launch binds and specialises the arguments of every call. That takes five times
        as long as to launch the compiled kernel directly, and nothing is specialised here. So
        Triton's own launch is used only the first time, and if hooks listen to launches, as those
        of profilers do. Triton would gather data for the hooks even if there are none.
        """
        compiled = self._compiled
        if compiled is None:
            with _one_at_a_time:
                compiled = self.kernel[(programs,)](
                    *args, **self.choices, num_warps=warps(self.device)
                )
            if isinstance(compiled, CompiledKernel):
                self._compiled = compiled
            return
        runtime = triton.knobs.runtime
        if _listens(runtime.launch_enter_hook) or _listens(runtime.launch_exit_hook):
            compiled[programs, 1, 1](*args, *self._values)
            return
        driver = triton.runtime.driver.active
        stream = driver.get_current_stream(driver.get_current_device())
        run = compiled.run  # this loads the kernel if it is not loaded yet
        what = compiled.function, compiled.packed_metadata
        run(programs, 1, 1, stream, *what, None, None, None, *args, *self._values)


@cache
def of_one(
    direction: Direction, t: Types, tile: Tile, finish: int, device: torch.device
) -> Variant:
    """Return the variant for a single weight."""
    choices = {
        "KIND": int(tile.kind), "LINES": tile.lines, "COLUMNS": tile.columns,
        "VECTOR": t.vector if tile.aligned else 1, "FINISH": finish,
    }  # fmt: skip
    return Variant(OF_ONE[direction], t, choices, device)


@cache
def of_list(
    direction: Direction, t: Types, rows_only: bool, finish: int, device: torch.device
) -> Variant:
    """Return the variant for a list, with a branch for every tile that the list may need.

    Most models need tiles of Kind.ROWS only. The other kinds take more registers, up to 128, and a
    kernel takes as many registers as its most expensive branch.
    """
    every = tiles(t.v.itemsize)
    needed = [k for k in every if k.kind is Kind.ROWS] if rows_only else every  # ROWS come first
    choices = {
        "TILES": tuple((int(k.kind), k.lines, k.columns, int(k.aligned)) for k in needed),
        "COUNT": len(needed), "VECTOR": t.vector, "FINISH": finish,
    }  # fmt: skip
    return Variant(OF_LIST[direction], t, choices, device)


def launched() -> int:
    """Return how many variants this process has launched. A variant is made only to be launched."""
    return of_one.cache_info().currsize + of_list.cache_info().currsize


def most() -> int:
    """Return how many variants there can be for one combination of dtypes."""
    every = tiles(torch.float32.itemsize)
    split = sum(k.kind is not Kind.ROWS for k in every)
    one, many = len(every) + split, 3
    return 2 * (one + many)


def warps(device: torch.device) -> int:
    """Return the number of warps of a program on a device, which must be the current one."""
    if INTERPRETED.value:
        return 1
    return THREADS // triton.runtime.driver.active.get_current_target().warp_size


def _listens(hook: object) -> bool:
    """Return whether there is a hook: a function (in Triton 3.4), or a chain that is not empty."""
    return bool(getattr(hook, "calls", hook))
