"""The kernels that are launched: one weight by its addresses, or a list by a table of them.

Their arguments are 64-bit integers, on which Triton is told not to specialise, and compile-time
choices. So it compiles no more variants than there are combinations of those.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_functions import backward_program, forward_program
from .plan import Plan
from .tables import BACKWARD, FORWARD, HEADER
from .tile import ROWS

SIZES = Plan._fields[1:-1]
"""What of a plan the kernels read: all but the tile, which is compiled in, and the total."""

_FORWARD_LINE = tl.constexpr(len(FORWARD.columns))
_BACKWARD_LINE = tl.constexpr(len(BACKWARD.columns))
_FIRST = tl.constexpr(HEADER.index("first"))
_PARTIALS = tl.constexpr(HEADER.index("partials"))
_EPS = tl.constexpr(HEADER.index("eps_bits"))
_ADDRESSES = tl.constexpr(len(HEADER))


@triton.jit
def _pointer(address, TYPE: tl.constexpr):
    return address.to(tl.int64).to(tl.pointer_type(TYPE))


@triton.jit
def _long(rows, inner, lines, pitch, strip_rows, width, numel, per_chunk, tiles, split):
    """A plan's sizes; the interpreter hands small integers over as 32 bits."""
    return (
        rows.to(tl.int64), inner.to(tl.int64), lines.to(tl.int64), pitch.to(tl.int64),
        strip_rows.to(tl.int64), width.to(tl.int64), numel.to(tl.int64), per_chunk.to(tl.int64),
        tiles.to(tl.int64), split.to(tl.int64),
    )  # fmt: skip


@triton.jit
def _sizes(line):
    """A plan's sizes from a line of a table, where they come in the order of SIZES."""
    return (
        tl.load(line + 1), tl.load(line + 2), tl.load(line + 3), tl.load(line + 4),
        tl.load(line + 5), tl.load(line + 6), tl.load(line + 7), tl.load(line + 8),
        tl.load(line + 9), tl.load(line + 10),
    )  # fmt: skip


@triton.jit
def _line(table, owners, LINE: tl.constexpr, FINISH: tl.constexpr):
    """The line of the weight that this program works on, its tile, and the program's number among
    those of the weight."""
    program = tl.program_id(0).to(tl.int64)
    owner = tl.load(_pointer(owners, tl.int64) + program)
    line = _pointer(table, tl.int64) + owner * LINE
    return line, tl.load(line), program - tl.load(line + _FIRST + FINISH)


@triton.jit(do_not_specialize=["v", "g", "w", "norm", "partials", "eps_bits", *SIZES])
def forward_one(
    v: tl.int64, g: tl.int64, w: tl.int64, norm: tl.int64, partials: tl.int64, eps_bits: tl.int64,
    rows: tl.int64, inner: tl.int64, lines: tl.int64, pitch: tl.int64, strip_rows: tl.int64,
    width: tl.int64, numel: tl.int64, per_chunk: tl.int64, tiles: tl.int64, split: tl.int64,
    V: tl.constexpr, G: tl.constexpr, W: tl.constexpr, ACC: tl.constexpr,
    KIND: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr,
    FINISH: tl.constexpr,
):  # fmt: skip
    """A forward of one weight: FINISH 0, and 1 after it if its rows are split."""
    forward_program(
        _pointer(v, V), _pointer(g, G), _pointer(w, W), _pointer(norm, ACC),
        _pointer(partials, ACC), eps_bits.to(tl.int64), tl.program_id(0).to(tl.int64),
        _long(rows, inner, lines, pitch, strip_rows, width, numel, per_chunk, tiles, split),
        KIND, LINES, COLUMNS, VECTOR, FINISH,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "grad_w", "v", "g", "norm", "grad_v", "grad_g", "partials", "eps_bits", *SIZES
    ]
)  # fmt: skip
def backward_one(
    grad_w: tl.int64, v: tl.int64, g: tl.int64, norm: tl.int64, grad_v: tl.int64, grad_g: tl.int64,
    partials: tl.int64, eps_bits: tl.int64,
    rows: tl.int64, inner: tl.int64, lines: tl.int64, pitch: tl.int64, strip_rows: tl.int64,
    width: tl.int64, numel: tl.int64, per_chunk: tl.int64, tiles: tl.int64, split: tl.int64,
    V: tl.constexpr, G: tl.constexpr, W: tl.constexpr, ACC: tl.constexpr,
    KIND: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr,
    FINISH: tl.constexpr,
):  # fmt: skip
    """A backward of one weight; a gradient at address 0 is not wanted."""
    backward_program(
        _pointer(grad_w, W), _pointer(v, V), _pointer(g, G), _pointer(norm, ACC),
        _pointer(grad_v, V), _pointer(grad_g, G), _pointer(partials, ACC),
        eps_bits.to(tl.int64), tl.program_id(0).to(tl.int64), grad_v != 0, grad_g != 0,
        _long(rows, inner, lines, pitch, strip_rows, width, numel, per_chunk, tiles, split),
        KIND, LINES, COLUMNS, VECTOR, FINISH,
    )  # fmt: skip


@triton.jit(do_not_specialize=["table", "owners", "partials"])
def forward_list(
    table: tl.int64, owners: tl.int64, partials: tl.int64,
    V: tl.constexpr, G: tl.constexpr, W: tl.constexpr, ACC: tl.constexpr,
    TILES: tl.constexpr, COUNT: tl.constexpr, VECTOR: tl.constexpr, FINISH: tl.constexpr,
):  # fmt: skip
    """A forward of all weights of a table: a branch for each tile."""
    line, tile, program = _line(table, owners, _FORWARD_LINE, FINISH)
    for k in tl.static_range(COUNT):
        if not (FINISH and TILES[k][0] == ROWS):
            if tile == k:
                forward_program(
                    _pointer(tl.load(line + _ADDRESSES), V),
                    _pointer(tl.load(line + _ADDRESSES + 1), G),
                    _pointer(tl.load(line + _ADDRESSES + 2), W),
                    _pointer(tl.load(line + _ADDRESSES + 3), ACC),
                    _pointer(partials, ACC) + tl.load(line + _PARTIALS),
                    tl.load(line + _EPS), program, _sizes(line),
                    TILES[k][0], TILES[k][1], TILES[k][2],
                    VECTOR if TILES[k][3] else 1, FINISH,
                )  # fmt: skip


@triton.jit(do_not_specialize=["table", "owners", "partials"])
def backward_list(
    table: tl.int64, owners: tl.int64, partials: tl.int64,
    V: tl.constexpr, G: tl.constexpr, W: tl.constexpr, ACC: tl.constexpr,
    TILES: tl.constexpr, COUNT: tl.constexpr, VECTOR: tl.constexpr, FINISH: tl.constexpr,
):  # fmt: skip
    """A backward of all weights of a table."""
    line, tile, program = _line(table, owners, _BACKWARD_LINE, FINISH)
    grad_v, grad_g = tl.load(line + _ADDRESSES + 4), tl.load(line + _ADDRESSES + 5)
    for k in tl.static_range(COUNT):
        if not (FINISH and TILES[k][0] == ROWS):
            if tile == k:
                backward_program(
                    _pointer(tl.load(line + _ADDRESSES), W),
                    _pointer(tl.load(line + _ADDRESSES + 1), V),
                    _pointer(tl.load(line + _ADDRESSES + 2), G),
                    _pointer(tl.load(line + _ADDRESSES + 3), ACC),
                    _pointer(grad_v, V), _pointer(grad_g, G),
                    _pointer(partials, ACC) + tl.load(line + _PARTIALS),
                    tl.load(line + _EPS), program, grad_v != 0, grad_g != 0, _sizes(line),
                    TILES[k][0], TILES[k][1], TILES[k][2],
                    VECTOR if TILES[k][3] else 1, FINISH,
                )  # fmt: skip
