"""The kernels that are launched, for one weight with its addresses or for a list with a table.

Their arguments are compile-time choices and 64-bit integers. Triton does not specialise on these
integers, so it compiles one variant for each combination of the choices.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_functions import backward_program, forward_program
from .plan import Plan
from .tables import BACKWARD, FORWARD, HEADER
from .tile import ROWS

SIZES = Plan._fields[1:-1]
"""The fields of a plan that kernels read: all except the tile, which is a compile-time choice, and
the number of programs."""

_FORWARD_LINE = tl.constexpr(len(FORWARD.columns))
_BACKWARD_LINE = tl.constexpr(len(BACKWARD.columns))
_FIRST = tl.constexpr(HEADER.index("first"))
_PARTIALS = tl.constexpr(HEADER.index("partials"))
_EPS = tl.constexpr(HEADER.index("eps_bits"))
_FORCED = tl.constexpr(HEADER.index("forced_bits"))
_ADDRESSES = tl.constexpr(len(HEADER))


@triton.jit
def _pointer(address, TYPE: tl.constexpr):
    return address.to(tl.int64).to(tl.pointer_type(TYPE))


@triton.jit
def _long(rows, inner, lines, pitch, strip_rows, width, numel, per_chunk, tiles, split):
    """Return the sizes of a plan in 64 bits: the interpreter passes small integers in 32 bits."""
    return (
        rows.to(tl.int64), inner.to(tl.int64), lines.to(tl.int64), pitch.to(tl.int64),
        strip_rows.to(tl.int64), width.to(tl.int64), numel.to(tl.int64), per_chunk.to(tl.int64),
        tiles.to(tl.int64), split.to(tl.int64),
    )  # fmt: skip


@triton.jit
def _sizes(line):
    """Load the sizes of a plan from a line of a table, where they have the order of SIZES."""
    return (
        tl.load(line + 1), tl.load(line + 2), tl.load(line + 3), tl.load(line + 4),
        tl.load(line + 5), tl.load(line + 6), tl.load(line + 7), tl.load(line + 8),
        tl.load(line + 9), tl.load(line + 10),
    )  # fmt: skip


@triton.jit
def _line(table, line_of, LINE: tl.constexpr, FINISH: tl.constexpr):
    """Return the line of the weight that this program works on, the tile of the weight, and the
    number of this program among all programs of the weight."""
    program = tl.program_id(0).to(tl.int64)
    number = tl.load(_pointer(line_of, tl.int64) + program)
    line = _pointer(table, tl.int64) + number * LINE
    return line, tl.load(line), program - tl.load(line + _FIRST + FINISH)


@triton.jit(
    do_not_specialize=["v", "g", "w", "norm", "partials", "eps_bits", "forced_bits", *SIZES]
)
def forward_one(
    v: tl.int64, g: tl.int64, w: tl.int64, norm: tl.int64, partials: tl.int64,
    eps_bits: tl.int64, forced_bits: tl.int64,
    rows: tl.int64, inner: tl.int64, lines: tl.int64, pitch: tl.int64, strip_rows: tl.int64,
    width: tl.int64, numel: tl.int64, per_chunk: tl.int64, tiles: tl.int64, split: tl.int64,
    V: tl.constexpr, G: tl.constexpr, W: tl.constexpr, ACC: tl.constexpr,
    KIND: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr,
    FINISH: tl.constexpr,
):  # fmt: skip
    """Run a forward of one weight. If its rows are split, a launch with FINISH 1 follows the launch
    with FINISH 0."""
    forward_program(
        _pointer(v, V), _pointer(g, G), _pointer(w, W), _pointer(norm, ACC),
        _pointer(partials, ACC), eps_bits.to(tl.int64), forced_bits.to(tl.int64),
        tl.program_id(0).to(tl.int64),
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
    """Run a backward of one weight. A gradient with address 0 is not computed."""
    backward_program(
        _pointer(grad_w, W), _pointer(v, V), _pointer(g, G), _pointer(norm, ACC),
        _pointer(grad_v, V), _pointer(grad_g, G), _pointer(partials, ACC),
        eps_bits.to(tl.int64), tl.program_id(0).to(tl.int64), grad_v != 0, grad_g != 0,
        _long(rows, inner, lines, pitch, strip_rows, width, numel, per_chunk, tiles, split),
        KIND, LINES, COLUMNS, VECTOR, FINISH,
    )  # fmt: skip


@triton.jit(do_not_specialize=["table", "line_of", "partials"])
def forward_list(
    table: tl.int64, line_of: tl.int64, partials: tl.int64,
    V: tl.constexpr, G: tl.constexpr, W: tl.constexpr, ACC: tl.constexpr,
    TILES: tl.constexpr, COUNT: tl.constexpr, VECTOR: tl.constexpr, FINISH: tl.constexpr,
):  # fmt: skip
    """Run a forward of all weights of a table. The kernel has a branch for each tile."""
    line, tile, program = _line(table, line_of, _FORWARD_LINE, FINISH)
    for k in tl.static_range(COUNT):
        if not (FINISH and TILES[k][0] == ROWS):
            if tile == k:
                forward_program(
                    _pointer(tl.load(line + _ADDRESSES), V),
                    _pointer(tl.load(line + _ADDRESSES + 1), G),
                    _pointer(tl.load(line + _ADDRESSES + 2), W),
                    _pointer(tl.load(line + _ADDRESSES + 3), ACC),
                    _pointer(partials, ACC) + tl.load(line + _PARTIALS),
                    tl.load(line + _EPS), tl.load(line + _FORCED), program, _sizes(line),
                    TILES[k][0], TILES[k][1], TILES[k][2],
                    VECTOR if TILES[k][3] else 1, FINISH,
                )  # fmt: skip


@triton.jit(do_not_specialize=["table", "line_of", "partials"])
def backward_list(
    table: tl.int64, line_of: tl.int64, partials: tl.int64,
    V: tl.constexpr, G: tl.constexpr, W: tl.constexpr, ACC: tl.constexpr,
    TILES: tl.constexpr, COUNT: tl.constexpr, VECTOR: tl.constexpr, FINISH: tl.constexpr,
):  # fmt: skip
    """Run a backward of all weights of a table. The kernel has a branch for each tile."""
    line, tile, program = _line(table, line_of, _BACKWARD_LINE, FINISH)
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
