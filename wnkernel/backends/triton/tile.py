"""Tiles in Triton: which elements a tile holds, and how they are loaded, stored and summed to rows.

``plan`` is a tuple of 64-bit integers: the fields of Plan (plan.py) without the first and the last.
``strip`` is the number of a strip of columns, of a row (RUNS) or of a tile of whole rows (ROWS).
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
"""Whether kernels run in Triton's interpreter. It truncates numbers that it converts to bfloat16,
and reads the bits of a bfloat16 as an integer if it converts them to float64."""


@triton.jit
def widen(x, ACC: tl.constexpr):
    """Return x in the type of sums."""
    if x.dtype == tl.bfloat16:
        x = x.to(tl.float32)  # the only conversion that the interpreter does right
    return x.to(ACC)


@triton.jit
def narrow(x, OUT: tl.constexpr):
    """Round x to the nearest number of type OUT, ties to even. From float64 to bfloat16 x is
    rounded to float32 first."""
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
    """Round x to the type of p, and store it."""
    tl.store(p, narrow(x, p.dtype.element_ty), mask=mask)


@triton.jit
def _whole(n, VECTOR: tl.constexpr):
    """Return n in a form that tells the compiler that n is a multiple of VECTOR. (Hints on the
    arguments of a function are lost when the function is inlined.)"""
    return n // VECTOR * VECTOR if VECTOR > 1 else n


@triton.jit
def _at(p, origin, offsets, VECTOR: tl.constexpr):
    """Return the addresses of the elements of a tile. With vectors, tiles start at multiples of 16
    bytes. But tiles of a w that is narrower than v start at multiples of VECTOR elements only."""
    BITS: tl.constexpr = VECTOR * p.dtype.element_ty.primitive_bitwidth
    ALIGNED: tl.constexpr = 16 if BITS > 128 else BITS // 8
    p += origin
    return (tl.multiple_of(p, ALIGNED) if VECTOR > 1 else p) + offsets


@triton.jit
def _left(n, most: tl.constexpr, VECTOR: tl.constexpr):
    """Return in 32 bits how many lines or columns a tile has, if ``n`` are left of the matrix."""
    return _whole(tl.minimum(n, most).to(tl.int32), VECTOR)


@triton.jit
def chunk_of(program, per_chunk, tiles, split):
    """Return the strip of a program, its place among the programs that share the strip, its first
    tile, and the end of its tiles. 32 bits are enough, because more tiles would take terabytes. A
    division of 64 bits is a call, for which the compiler keeps registers free around loops."""
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
    """Return the first element of a tile, the offsets of all elements from the first, and the mask
    of the elements that exist. Every plan ensures that offsets fit in 32 bits."""
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
    if KIND == STRIPS:  # the last line of a folded matrix may end early
        mask &= offsets < _left(numel - origin, 2**31 - 1, VECTOR)
    return origin, offsets, mask


@triton.jit
def load(p, origin, offsets, mask, ACC: tl.constexpr, VECTOR: tl.constexpr):
    """Load a tile in the type of sums, with zeros for elements that do not exist."""
    return widen(tl.load(_at(p, origin, offsets, VECTOR), mask=mask, other=0.0), ACC)


@triton.jit
def store_at(p, origin, offsets, x, mask, VECTOR: tl.constexpr):
    """Store a tile, rounded to the type of p."""
    store(_at(p, origin, offsets, VECTOR), x, mask)


@triton.jit
def _divided(small, n):
    """Return small // n; both are at most 256. A division would take ten times the instructions,
    and every thread would do one for each column when columns are compared."""
    return (small * ((0xFFFF + n) // n)) >> 16


@triton.jit
def _rows_of_columns(column, rows, inner, COLUMNS: tl.constexpr):
    """Return the row of each column of a strip, counted from the first row of the strip."""
    row, rows = _divided(column, inner.to(tl.int32)), tl.minimum(rows, COLUMNS).to(tl.int32)
    return row - _divided(row, rows) * rows


@triton.jit
def rows_of(strip, plan, KIND: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the rows of a program, shaped to broadcast with its tiles, the mask of the rows that
    exist, and the mask of the first place of each row."""
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
    """Add up a tile of sums to one sum for each row, shaped to broadcast with tiles."""
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
    """Return the addresses of the partial sums of all programs of a row or strip, and the mask of
    those that exist, in the shape [1, programs, columns]. Triton would give a tensor of two
    dimensions the layout of a tile of the same shape, and the layout decides the order of sums."""
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
    """Store the partial sums ``x`` of a program."""
    if KIND == RUNS:
        tl.store(partials + program * PLANES + plane + tl.arange(0, 1)[None, :], x)
    else:
        column = tl.arange(0, COLUMNS)[None, :]
        tl.store(partials + (program * PLANES + plane) * COLUMNS + column, x)
