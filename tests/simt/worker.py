"""Runs kernels in a process of its own, which a sanitizer may end: reads pickled requests and
writes pickled answers."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_double, c_float, c_int64, c_size_t, c_uint8, c_void_p, sizeof
from dataclasses import fields
from functools import singledispatch
from itertools import product
from math import prod

from .protocol import (
    PROCESSORS,
    UNWRITTEN,
    Call,
    Called,
    Ends,
    Launch,
    Numbers,
    Plan,
    Plans,
    Problem,
    Rounded,
    Takes,
    read,
    write,
)

STREAM = 0x5EED
MAP_NORESERVE = 0x4000
"""Of Linux; mmap has it from Python 3.13 on."""
FLOAT = 2
"""wnkernel::DType::f32."""

LIBC = ctypes.CDLL(None)
LIBC.posix_memalign.argtypes = [POINTER(c_void_p), c_size_t, c_size_t]
LIBC.free.argtypes = [c_void_p]

KERNELS = ctypes.CDLL(sys.argv[1])


VIEW = [(name, c_int64) for name in ("outer", "rows", "inner")]
TYPES = [(name, c_uint8) for name in ("v_type", "g_type", "w_type")]
EPS = ("eps", c_double)


class Forward(ctypes.Structure):
    """wnkernel::Forward."""

    _arrays = ("v", "g", "w", "norm")
    _fields_ = (
        *((name, c_void_p) for name in _arrays), *VIEW, *TYPES, ("divisor_type", c_uint8), EPS,
        ("forced", c_double),
    )  # fmt: skip


class Backward(ctypes.Structure):
    """wnkernel::Backward."""

    _arrays = ("grad_w", "v", "g", "norm", "grad_v", "grad_g")
    _fields_ = (*((name, c_void_p) for name in _arrays), *VIEW, *TYPES, EPS)


class Heap:
    """Arrays whose bounds sanitizers know."""

    def __init__(self) -> None:
        self._blocks: list[c_void_p] = []

    def reserve(self, size: int, offset: int) -> int:
        """``size`` bytes, ``offset`` after a 16-byte boundary."""
        block = c_void_p()
        assert LIBC.posix_memalign(byref(block), 16, size + offset) == 0
        self._blocks.append(block)
        ctypes.memset(block, UNWRITTEN, size + offset)
        return block.value + offset

    def copy(self, data: bytes, offset: int) -> int:
        """The same, with something in it."""
        place = self.reserve(len(data), offset)
        ctypes.memmove(place, data, len(data))
        return place

    def free(self) -> None:
        for block in self._blocks:
            LIBC.free(block)


@contextmanager
def heap() -> Iterator[Heap]:
    memory = Heap()
    try:
        yield memory
    finally:
        memory.free()


@singledispatch
def answer(request: object) -> object:
    raise TypeError(f"no answer to {request!r}")


@answer.register
def _(call: Call) -> Called:
    line, launch = {
        "forward": (Forward, KERNELS.simt_forward),
        "backward": (Backward, KERNELS.simt_backward),
    }[call.direction]
    with heap() as memory:
        places = [_place(memory, p) for p in call.problems]
        lines = [
            line(**p, **problem.fields) for p, problem in zip(places, call.problems, strict=True)
        ]
        table = (line * len(places))(*lines)
        KERNELS.simt_begin(
            call.order, c_int64(call.failing_launch), 0, call.processors, call.mutant
        )
        error = launch(table, c_int64(len(places)), c_void_p(STREAM))
        outputs = []
        for problem, place in zip(call.problems, places, strict=True):
            for name in problem.inputs.keys() - {*problem.outputs, *problem.same.values()}:
                data = problem.inputs[name]
                assert ctypes.string_at(place[name], len(data)) == data, f"{name} was changed"
            outputs.append({k: ctypes.string_at(place[k], n) for k, n in problem.outputs.items()})
    launches = _log("launches", 4)
    return Called(
        error,
        [
            Launch(blocks, threads, stream == STREAM, size)
            for blocks, threads, stream, size in launches
        ],
        [size for (size,) in _log("workspaces", 1)],
        outputs,
    )


def _place(memory: Heap, problem: Problem) -> dict[str, int]:
    """Addresses of all arrays."""
    offset = problem.offsets.get
    places = {name: memory.copy(data, offset(name, 0)) for name, data in problem.inputs.items()}
    places |= {name: places[of] for name, of in problem.same.items()}
    new = {k: n for k, n in problem.outputs.items() if k not in places}
    return places | {k: memory.reserve(n, offset(k, 0)) for k, n in new.items()}


@answer.register
def _(ends: Ends) -> list[tuple[float, list[float]]]:
    """The norm and w of the first and of the last row."""
    outer, rows, inner = ends.view
    sizes = {"v": prod(ends.view), "w": prod(ends.view), "g": rows, "norm": rows}
    arrays = {
        name: (c_float * size).from_buffer(_sparse(size * sizeof(c_float)))
        for name, size in sizes.items()
    }
    places = {
        row: [o * rows * inner + row * inner + i for o in range(outer) for i in range(inner)]
        for row in (0, rows - 1)
    }
    for number, (row, of_row) in enumerate(places.items(), 1):
        arrays["g"][row] = 3
        for at in of_row:
            arrays["v"][at] = number
    addresses = {name: ctypes.addressof(array) for name, array in arrays.items()}
    types = dict.fromkeys(("v_type", "g_type", "w_type", "divisor_type"), FLOAT)
    line = Forward(**addresses, **types, outer=outer, rows=rows, inner=inner)
    KERNELS.simt_begin(0, c_int64(-1), 1, PROCESSORS, ends.mutant)
    assert KERNELS.simt_forward(byref(line), c_int64(1), c_void_p(STREAM)) == 0
    w = arrays["w"]
    return [(arrays["norm"][row], [w[at] for at in of_row]) for row, of_row in places.items()]


def _sparse(size: int) -> mmap.mmap:
    """Zeros that take no memory until they are written."""
    return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)


def _log(name: str, columns: int) -> list[tuple[int, ...]]:
    """What the driver has written down since the call began."""
    rows = getattr(KERNELS, f"simt_{name}")(None)
    numbers = (c_int64 * (rows * columns))()
    getattr(KERNELS, f"simt_{name}")(numbers)
    return [tuple(numbers[k * columns : (k + 1) * columns]) for k in range(rows)]


@answer.register
def _(numbers: Numbers) -> Numbers:
    found = (c_int64 * len(fields(numbers)))()
    KERNELS.simt_numbers(found)
    return Numbers(*found)


@answer.register
def _(plans: Plans) -> list[Plan]:
    numbers = (c_int64 * len(Plan._fields))()
    found = []
    for *view, element_bytes, vector in plans.views:
        KERNELS.simt_plan(
            *map(c_int64, view), element_bytes, vector, c_int64(plans.places), numbers
        )
        found.append(Plan(*numbers))
    return found


@answer.register
def _(rounded: Rounded) -> dict[str, tuple[bytes, bytes]]:
    n = len(rounded.numbers) // 4
    results = {}
    for name in ("half", "bfloat16"):
        bits, back = ctypes.create_string_buffer(2 * n), ctypes.create_string_buffer(4 * n)
        getattr(KERNELS, f"simt_round_{name}")(rounded.numbers, c_int64(n), bits, back)
        results[name] = (bits.raw, back.raw)
    return results


@answer.register
def _(takes: Takes) -> set[tuple[int, int]]:
    every = product(range(takes.types), repeat=2)
    return {(v, w) for v, w in every if KERNELS.simt_takes(v, w)}


def main() -> None:
    """Answer until there are no more requests."""
    for name, line in (("forward", Forward), ("backward", Backward)):
        assert getattr(KERNELS, f"simt_sizeof_{name}")() == ctypes.sizeof(line)
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # what else is printed belongs into the log
        while True:
            try:
                request = read(sys.stdin.buffer)
            except EOFError:
                return
            write(answer(request), answers)


if __name__ == "__main__":
    main()
