"""Tiles in Triton: which elements they hold, how those are loaded, stored and added up to rows.

Plans (plan.py) come as a tuple of 64-bit integers, the fields of Plan without its first and its
last. ``strip`` counts what programs work on: strips of columns, rows that come in runs, or tiles of
whole rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .plan import MAX_PARTIALS, MAX_SPLIT, Kind

ROWS = tl.constexpr(int(Kind.ROWS))
RUNS = tl.constexpr(int(Kind.RUNS))
STRIPS = tl.constexpr(int(Kind.STRIPS))
_MAX_SPLIT = tl.constexpr(MAX_SPLIT)
_MAX_PARTIALS = tl.constexpr(MAX_PARTIALS)


@triton.jit
def _nothing():
    pass


INTERPRETED = tl.constexpr(not isinstance(_nothing, triton.JITFunction))
"""Whether kernels run in Triton's interpreter, whose conversions of bfloat16 truncate, and read
float64 from one as an integer."""


@triton.jit
def widen(x, ACC: tl.constexpr):
    """x in the type of sums."""
    if x.dtype == tl.bfloat16:
        x = x.to(tl.float32)  # the interpreter knows no other way
    return x.to(ACC)


@triton.jit
def narrow(x, OUT: tl.constexpr):
    """x rounded to the nearest, ties to even; float64 to bfloat16 by way of float32."""
    if OUT == tl.bfloat16:
        x = x.to(tl.float32)
        if INTERPRETED:
            bits = x.to(tl.uint32, bitcast=True)
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
            quiet = ((bits >> 16) | 0x40).to(tl.uint16)
            x = tl.where(x == x, rounded, quiet).to(tl.bfloat16, bitcast=True)
    return x.to(OUT)


@triton.jit
def store(p, x, mask):
    """Stores x, rounded."""
    tl.store(p, narrow(x, p.dtype.element_ty), mask=mask)


@triton.jit
def _whole(n, VECTOR: tl.constexpr):
    """n, in a way that shows the compiler that it counts whole vectors. (Hints on the arguments of
    a function are lost when it is inlined.)"""
    return n // VECTOR * VECTOR if VECTOR > 1 else n


@triton.jit
def _at(p, origin, offsets, VECTOR: tl.constexpr):
    """Addresses. Arrays start at multiples of 16 bytes if there are vectors, but the tiles of a w
    that is narrower than v only at multiples of as many elements."""
    BITS: tl.constexpr = VECTOR * p.dtype.element_ty.primitive_bitwidth
    ALIGNED: tl.constexpr = 16 if BITS > 128 else BITS // 8
    p += origin
    return (tl.multiple_of(p, ALIGNED) if VECTOR > 1 else p) + offsets


@triton.jit
def _left(n, most: tl.constexpr, VECTOR: tl.constexpr):
    """n of a tile's lines or columns, in 32 bits."""
    return _whole(tl.minimum(n, most).to(tl.int32), VECTOR)


@triton.jit
def chunk_of(program, per_chunk, tiles, split):
    """Of a program: its strip, its place among those that share it, the first of its tiles and the
    one after them. All in 32 bits, for so many tiles take terabytes: a division of 64 bits
    is a call, and the compiler keeps registers free for it around loops."""
    program, split = program.to(tl.int32), split.to(tl.int32)
    chunk = program % split
    start = chunk * per_chunk.to(tl.int32)
    end = tl.minimum(start + per_chunk.to(tl.int32), tiles.to(tl.int32))
    return (program // split).to(tl.int64), chunk, start, end


@triton.jit
def tile_of(
    tile, strip, plan,
    KIND: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """A tile of a strip: its first element, the offsets of the others from there, which there are.
    A plan sees to it that offsets fit in 32 bits."""
    rows, inner, lines, pitch, strip_rows, width, numel, _per_chunk, _tiles, _split = plan
    origin = strip * strip_rows * inner
    if KIND == ROWS:
        lines -= strip * strip_rows
    elif KIND == RUNS:
        across = ((width + COLUMNS - 1) // COLUMNS).to(tl.int32)
        first = (tile % across).to(tl.int64) * COLUMNS
        above = (tile // across).to(tl.int64) * LINES
        origin += above * pitch + first
        lines -= above
        width -= first
    else:
        width = tl.minimum(width, pitch - origin)
        above = tl.cast(tile, tl.int64) * LINES
        origin += above * pitch
        lines -= above
    line = tl.arange(0, LINES)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    offsets = line * _whole(pitch.to(tl.int32), VECTOR) + column
    mask = (line < _left(lines, LINES, 1)) & (column < _left(width, COLUMNS, VECTOR))
    if KIND == STRIPS:  # folded, the last line may end early
        mask &= offsets < _left(numel - origin, 2**31 - 1, VECTOR)
    return origin, offsets, mask


@triton.jit
def load(p, origin, offsets, mask, ACC: tl.constexpr, VECTOR: tl.constexpr):
    """A tile in the type of sums; zeros where there is no element."""
    return widen(tl.load(_at(p, origin, offsets, VECTOR), mask=mask, other=0.0), ACC)


@triton.jit
def store_at(p, origin, offsets, x, mask, VECTOR: tl.constexpr):
    """Stores a tile."""
    store(_at(p, origin, offsets, VECTOR), x, mask)


@triton.jit
def _divided(small, n):
    """small // n, both up to 256. A division takes ten times the instructions, and every thread has
    one for each column where columns are compared."""
    return (small * ((0xFFFF + n) // n)) >> 16


@triton.jit
def _rows_of_columns(column, rows, inner, COLUMNS: tl.constexpr):
    """The rows of columns of a strip, counted from the strip's first."""
    row, rows = _divided(column, inner.to(tl.int32)), tl.minimum(rows, COLUMNS).to(tl.int32)
    return row - _divided(row, rows) * rows


@triton.jit
def rows_of(strip, plan, KIND: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr):
    """The rows of a program, shaped to go with its tiles; which there are; where each is first."""
    rows, inner, lines, pitch, strip_rows, width, numel, per_chunk, tiles, split = plan
    first_row = strip * strip_rows
    if KIND == ROWS:
        row = (first_row + tl.arange(0, LINES))[:, None]
        valid = row < rows
        return row, valid, valid
    elif KIND == RUNS:
        row = tl.full([1, 1], 0, tl.int64) + first_row
        valid = row < rows
        return row, valid, valid
    else:
        column = tl.arange(0, COLUMNS)[None, :]
        row = first_row + _rows_of_columns(column, rows, inner, COLUMNS)
        valid = (row < rows) & (column < width)
        is_first = _divided(column, inner.to(tl.int32)) * inner == column
        return row, valid, valid & is_first & (column < strip_rows * inner)


@triton.jit
def row_sums(sums, rows, inner, KIND: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of sums added up to one for each row, shaped to go with tiles."""
    if KIND == ROWS:
        return tl.sum(sums, 1, keep_dims=True)
    elif KIND == RUNS:
        return tl.sum(tl.sum(sums, 1, keep_dims=True), 0, keep_dims=True)
    else:
        column = tl.arange(0, COLUMNS)
        row = _rows_of_columns(column, rows, inner, COLUMNS)
        same = row[:, None] == row[None, :]
        return tl.sum(tl.where(same, tl.sum(sums, 0)[:, None], 0.0), 0, keep_dims=True)


@triton.jit
def partial_sums(
    partials, strip, split, plane, PLANES: tl.constexpr, KIND: tl.constexpr, COLUMNS: tl.constexpr
):
    """Addresses of what every program of a row or strip leaves behind, and which there are: [1,
    programs, columns]. Triton would lay out a tensor of two dimensions like a tile of that shape,
    if the kernel has one, and the order of addition depends on the layout."""
    first = strip * split * PLANES + plane
    if KIND == RUNS:
        chunk = tl.arange(0, _MAX_SPLIT)[None, :, None]
        return partials + first + chunk * PLANES, chunk < split
    else:
        chunk = tl.arange(0, _MAX_PARTIALS // COLUMNS)[None, :, None]
        column = tl.arange(0, COLUMNS)[None, None, :]
        p = tl.multiple_of(partials + first * COLUMNS, 16)
        return p + (chunk * (PLANES * COLUMNS) + column), (chunk < split) & (column < COLUMNS)


@triton.jit
def store_partial_sum(
    partials, program, plane, x, PLANES: tl.constexpr, KIND: tl.constexpr, COLUMNS: tl.constexpr
):
    """Leaves behind what a program added up."""
    if KIND == RUNS:
        tl.store(partials + program * PLANES + plane + tl.arange(0, 1)[None, :], x)
    else:
        column = tl.arange(0, COLUMNS)[None, :]
        tl.store(partials + (program * PLANES + plane) * COLUMNS + column, x)
