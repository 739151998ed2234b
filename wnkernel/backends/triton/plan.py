"""How a weight norm is cut into programs: every launch number of the Triton kernels is here.

A program works on tiles of ``lines x columns`` elements; memory is contiguous along columns. There
are three ways to lay rows (the elements of one norm) over tiles:

- ``ROWS``: a line of the tile is a whole row. Read once.
- ``RUNS``: one row per program, run by run, over as many tiles as it takes: long rows, and rows
  that come in runs of ``inner`` elements.
- ``STRIPS``: a strip of adjacent columns of the matrix ``[outer, rows * inner]``, over as many
  tiles as it takes; the sums of columns are added up to rows at the end. Columns of a narrow matrix
  are folded: several of its lines make one line of the tile.

The last two read v (and grad_w) twice, the second time from a cache, mostly. Where there are too
few programs to fill a card, a row or a strip is split over several, which leave partial sums
behind; a second launch adds them up, in the same order in every program, and scales. Everything
here depends on the shape, the element size and the alignment of one weight, so its bits do not
depend on its neighbours, nor on the card's number of processors.

None of these numbers was measured on a GPU yet; the reasons are arithmetic.
"""

from __future__ import annotations

import enum
from functools import cache, lru_cache
from typing import NamedTuple

THREADS = 256
"""Of a program."""

VECTOR_BYTES = 16
"""The widest access of a thread. Tiles marked ``aligned`` use it."""

TILE = 4096
"""Elements of most tiles: 16 a thread, in flight as 4 loads of 16 bytes for float32. Twice that is
the longest row that stays on chip: with its gradient it takes 64 registers of a thread. float64 has
a quarter, for its numbers and addresses take twice the registers, and nobody trains in it.

With these sizes no variant takes more than 128 registers with Triton 3.6.0 and 3.7.1, so that two
programs and more share a processor. Some put up to 16 bytes aside to stay at 80 registers or 64,
and so make room for one program more (docs/gpu.md, tests/triton/offline_checks.py)."""

STRIP = 32
"""Columns of a strip: a cache line of float32, two sectors of halves. Narrower than a cache line
would be wasteful, and wider strips are fewer, while the sums of columns are added up to rows by
comparing all columns of a strip with all."""

OFFSET_LIMIT = (1 << 31) - VECTOR_BYTES
"""Elements that a tile may span: kernels count them, and whole vectors of them, in 32 bits."""

FILL = 512
"""Programs that fill a large card: four for each of about 130 processors, in two waves where the
registers let two share one."""

SPLIT_TILES = 4
"""Tiles that a program of a split row has at least: more programs mean more partial sums to add.
And fewer would not pay for the second launch, about 3 us. One after the other, tiles take about
0.7 us each, the latency of memory, and twice that, for they are summed and then scaled. So 8 tiles
take a program 11 us, and two programs 6 and a launch; 7 and less are left to one."""

MAX_SPLIT = 512
"""Programs that share a row at most: each of them reads the partial sums of all."""

MAX_PARTIALS = 2048
"""Partial sums of a strip at most, one for each column and program: they are read as one tile."""


class Kind(enum.IntEnum):
    """How rows lie over tiles."""

    ROWS = 0
    RUNS = 1
    STRIPS = 2


class Tile(NamedTuple):
    """A compile-time choice: one branch of the kernels for lists, one variant of the others."""

    kind: Kind
    lines: int
    columns: int
    aligned: bool
    """Lines start at 16-byte addresses and hold whole vectors."""


@cache
def tiles(itemsize: int) -> tuple[Tile, ...]:
    """Every tile for an element size in bytes. Their places in this tuple name them in tables."""
    full = TILE if itemsize <= 4 else TILE // 4
    # Triton lays out tensors of one shape alike if it can, and so a weight in a list could be added
    # up in another order than alone: no tile that is aligned may have the shape of one that is not.
    loose = full // 4
    strip = STRIP if itemsize <= 4 else STRIP // 2
    return (
        # Rows of real convolutions are multiples of 16 bytes. At most half of a tile is empty.
        *(Tile(Kind.ROWS, max(full // n, 1), n, True) for n in _powers(64, 2 * full)),
        # Depthwise kernels and odd sizes: little memory, so that empty lanes do not matter, and
        # every element takes an address of its own.
        *(Tile(Kind.ROWS, loose // n, n, False) for n in (16, 64, loose // 2)),
        Tile(Kind.ROWS, 1, 2 * loose, False),
        *(Tile(Kind.RUNS, lines, full // lines, True) for lines in (1, 32)),
        *(Tile(Kind.RUNS, lines, loose // lines, False) for lines in (1, 32)),
        Tile(Kind.STRIPS, full // 2 // strip, strip, True),
        Tile(Kind.STRIPS, loose // strip, strip, False),
    )


class Plan(NamedTuple):
    """One weight norm over one kind of tile. Sizes are in elements."""

    tile: int
    """Its place in :func:`tiles`."""
    rows: int
    inner: int
    lines: int
    """Of the matrix that tiles cover."""
    pitch: int
    """From one line of it to the next."""
    strip_rows: int
    """Rows of a program."""
    width: int
    """Columns of a program."""
    numel: int
    per_chunk: int
    """Tiles of a program."""
    tiles: int
    """Tiles of all programs that share a row or a strip."""
    split: int
    """Programs that share a row or a strip."""
    programs: int


@lru_cache(maxsize=4096)
def plan(outer: int, rows: int, inner: int, itemsize: int, vector: int) -> Plan:
    """How to cut a non-empty ``[outer, rows, inner]``.

    Args:
        outer, rows, inner: the view of the weight, in memory order.
        itemsize: bytes of an element of v.
        vector: elements of the widest access that the addresses of all arrays allow; 1 for none.
    """
    choices = tiles(itemsize)
    strip = next(t for t in choices if t.kind is Kind.STRIPS).columns
    if outer == 1:
        aligned = vector > 1 and inner % vector == 0 and inner > 16
        if (place := _first(choices, Kind.ROWS, aligned, inner)) is not None:
            return _rows(place, choices[place], rows, inner)
    if outer > 1 and inner <= strip:
        cut = _strips(choices, outer, rows, inner, vector, strip)
        if _spans(choices[cut.tile], cut.lines, cut.pitch) <= OFFSET_LIMIT:
            return cut
    return _runs(choices, outer, rows, inner, vector)


def _rows(place: int, tile: Tile, rows: int, inner: int) -> Plan:
    programs = _ceil(rows, tile.lines)
    return Plan(place, rows, inner, rows, inner, tile.lines, inner, rows * inner, 1, 1, 1, programs)


def _runs(choices: tuple[Tile, ...], outer: int, rows: int, inner: int, vector: int) -> Plan:
    aligned, pitch = vector > 1 and inner % vector == 0, rows * inner
    counts = {
        k: _ceil(outer, t.lines) * _ceil(inner, t.columns)
        for k, t in enumerate(choices)
        if t.kind is Kind.RUNS and t.aligned is aligned and _spans(t, outer, pitch) <= OFFSET_LIMIT
    }
    place = min(counts, key=counts.__getitem__)
    split, per_chunk = _split(MAX_SPLIT, rows, counts[place])
    return Plan(
        place, rows, inner, outer, pitch, 1, inner, outer * pitch,
        per_chunk, counts[place], split, rows * split,
    )  # fmt: skip


def _strips(
    choices: tuple[Tile, ...], outer: int, rows: int, inner: int, vector: int, strip: int
) -> Plan:
    numel, pitch = outer * rows * inner, rows * inner
    if pitch <= strip:  # all columns, and several lines of the matrix side by side
        fold = min(strip // pitch, outer)
        if vector > 1:
            fold = _multiple(fold, pitch, vector)
        strip_rows, strips, width = rows, 1, fold * pitch
        lines, pitch = _ceil(outer, fold), width
    else:
        strip_rows = min(strip // inner, rows)
        if vector > 1:
            strip_rows = _multiple(strip_rows, inner, vector)
        strips, width, lines = _ceil(rows, strip_rows), strip_rows * inner, outer
    aligned = vector > 1 and all(n % vector == 0 for n in (pitch, width, numel))
    place = _first(choices, Kind.STRIPS, aligned, width)
    assert place is not None  # strips are as wide as a tile at most
    count = _ceil(lines, choices[place].lines)
    split, per_chunk = _split(MAX_PARTIALS // strip, strips, count)
    return Plan(
        place, rows, inner, lines, pitch, strip_rows, width, numel,
        per_chunk, count, split, strips * split,
    )  # fmt: skip


def _split(most: int, programs: int, count: int) -> tuple[int, int]:
    """Into how many programs, ``most`` of them, to split each of ``programs`` with ``count`` tiles,
    and the tiles of each of those."""
    wanted = min(_ceil(FILL, programs), count // SPLIT_TILES, most)
    if wanted < 2:
        return 1, count
    per_chunk = _ceil(count, wanted)
    return _ceil(count, per_chunk), per_chunk


def _first(choices: tuple[Tile, ...], kind: Kind, aligned: bool, columns: int) -> int | None:
    """The first tile of a kind that is wide enough."""
    fitting = (
        k
        for k, t in enumerate(choices)
        if t.kind is kind and t.aligned is aligned and t.columns >= columns
    )
    return next(fitting, None)


def _spans(tile: Tile, lines: int, pitch: int) -> int:
    """Elements from the first to the last of a tile, of those of its lines that there are."""
    return (min(tile.lines, lines) - 1) * pitch + tile.columns


def _multiple(most: int, size: int, vector: int) -> int:
    """The largest count up to ``most`` whose product with ``size`` holds whole vectors, if any."""
    return next((n for n in range(most, 0, -1) if n * size % vector == 0), most)


def _powers(first: int, last: int) -> list[int]:
    return [1 << k for k in range(first.bit_length() - 1, last.bit_length())]


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
