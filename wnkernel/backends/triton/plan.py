"""Cuts a weight into programs. All numbers that shape the launches of Triton kernels are here.

A program works on tiles of ``lines x columns`` elements, which are contiguous along columns. Rows
(the elements of one norm) lie over tiles in one of three ways:

- ``ROWS``: each line of a tile is a whole row. The inputs are read once.
- ``RUNS``: a program works on one row, over as many tiles as the row takes. This is for long rows,
  and for rows that consist of separate runs of ``inner`` elements.
- ``STRIPS``: a program works on a strip of adjacent columns of a matrix ``[outer, rows * inner]``,
  over as many tiles as the strip takes. At the end the sums of columns are added up to rows. A
  narrow matrix is folded: several of its lines make one line of a tile.

RUNS and STRIPS read v (and grad_w) twice, the second time mostly from a cache. If there are too few
programs to fill a card, a row or a strip is split over several programs, each of which stores
partial sums. A second launch adds these up, in the same order in every program, and scales.
Everything here depends only on the shape, the element size and the alignment of one weight. So the
bits of a weight depend neither on its neighbours nor on the card's number of processors.

None of these numbers was measured on a GPU yet; they follow from arithmetic.
"""

from __future__ import annotations

import enum
from functools import cache, lru_cache
from typing import NamedTuple

THREADS = 256
"""The threads of a program."""

VECTOR_BYTES = 16
"""The widest access of a thread. Tiles marked ``aligned`` use it."""

TILE = 4096
"""The elements of most tiles. Each thread has 16 of them: 4 loads of 16 bytes in float32. The
longest row that stays on chip has twice as many: with its gradient it takes 64 registers of a
thread. Tiles of float64 have a quarter, because their numbers and addresses take twice the
registers, and nobody trains in float64.

With these sizes no variant takes more than 128 registers with Triton 3.6.0 and 3.7.1, so at least
two programs share a processor. Some variants spill up to 16 bytes to stay at 80 or 64 registers,
which makes room for one more program (docs/gpu.md, tests/triton/offline_checks.py)."""

STRIP = 32
"""The columns of a strip: a cache line of float32, or two sectors of a half type. Narrower strips
would waste parts of cache lines. Wider strips would give fewer programs and slower sums of rows,
for which each column of a strip is compared with all others."""

OFFSET_LIMIT = (1 << 31) - VECTOR_BYTES
"""The most elements that a tile may span, because kernels compute offsets in 32 bits."""

FILL = 512
"""The programs that fill a large card of about 130 processors: four for each. They run in two waves
if registers let only two programs share a processor."""

SPLIT_TILES = 4
"""The fewest tiles of a program that shares a row. With fewer there would be more partial sums, and
the split would not pay for the second launch, which takes about 3 us. A program takes about 0.7 us,
the latency of memory, to sum a tile, and as long to scale it. So one program takes 11 us for 8
tiles; two programs take 6 us and a launch. A row of 7 tiles or fewer is not split."""

MAX_SPLIT = 512
"""The most programs that may share a row, because each of them reads the partial sums of all."""

MAX_PARTIALS = 2048
"""The most partial sums of a strip, one for each column and program. They are read as one tile."""


class Kind(enum.IntEnum):
    """The ways in which rows lie over tiles."""

    ROWS = 0
    RUNS = 1
    STRIPS = 2


class Tile(NamedTuple):
    """A compile-time choice. Kernels for lists have a branch for each tile; kernels for one weight
    have a variant for each tile."""

    kind: Kind
    lines: int
    columns: int
    aligned: bool
    """Whether lines start at multiples of 16 bytes and hold whole vectors."""


@cache
def tiles(itemsize: int) -> tuple[Tile, ...]:
    """Return all tiles for an element size in bytes. Tables name a tile by its place here."""
    full = TILE if itemsize <= 4 else TILE // 4
    # Triton gives tensors of the same shape the same layout, if it can. So no aligned tile may have
    # the shape of another tile: a list might be summed in another order than its weights alone.
    loose = full // 4
    strip = STRIP if itemsize <= 4 else STRIP // 2
    return (
        # Rows of real convolutions are multiples of 16 bytes. At most half of a tile is empty.
        *(Tile(Kind.ROWS, max(full // n, 1), n, True) for n in _powers(64, 2 * full)),
        # Depthwise kernels and odd sizes take little memory, so empty lanes do not matter. Here
        # each element has its own address.
        *(Tile(Kind.ROWS, loose // n, n, False) for n in (16, 64, loose // 2)),
        Tile(Kind.ROWS, 1, 2 * loose, False),
        *(Tile(Kind.RUNS, lines, full // lines, True) for lines in (1, 32)),
        *(Tile(Kind.RUNS, lines, loose // lines, False) for lines in (1, 32)),
        Tile(Kind.STRIPS, full // 2 // strip, strip, True),
        Tile(Kind.STRIPS, loose // strip, strip, False),
    )


class Plan(NamedTuple):
    """How one weight is cut into programs. Sizes are in elements."""

    tile: int
    """The place of the tile in :func:`tiles`."""
    rows: int
    inner: int
    lines: int
    """The lines of the matrix that tiles cover."""
    pitch: int
    """The distance of two lines of that matrix."""
    strip_rows: int
    """The rows of a program."""
    width: int
    """The columns of a program."""
    numel: int
    per_chunk: int
    """The tiles of a program."""
    tiles: int
    """The tiles of all programs that share a row or a strip."""
    split: int
    """The number of programs that share a row or a strip; 1 if it is not split."""
    programs: int


@lru_cache(maxsize=4096)
def plan(outer: int, rows: int, inner: int, itemsize: int, vector: int) -> Plan:
    """Return how to cut a weight ``[outer, rows, inner]``, which must not be empty.

    Args:
        outer, rows, inner: the view of the weight, in memory order.
        itemsize: the bytes of an element of v.
        vector: the number of elements in the widest access that the addresses of all arrays allow;
            1 if they allow none that is wider than an element.
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
    if pitch <= strip:  # one strip has all columns, with several lines of the matrix side by side
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
    assert place is not None  # strips are at most as wide as a tile
    count = _ceil(lines, choices[place].lines)
    split, per_chunk = _split(MAX_PARTIALS // strip, strips, count)
    return Plan(
        place, rows, inner, lines, pitch, strip_rows, width, numel,
        per_chunk, count, split, strips * split,
    )  # fmt: skip


def _split(most: int, programs: int, count: int) -> tuple[int, int]:
    """Return into how many programs to split each of ``programs`` programs with ``count`` tiles, at
    most ``most``, and the tiles of each program after that."""
    wanted = min(_ceil(FILL, programs), count // SPLIT_TILES, most)
    if wanted < 2:
        return 1, count
    per_chunk = _ceil(count, wanted)
    return _ceil(count, per_chunk), per_chunk


def _first(choices: tuple[Tile, ...], kind: Kind, aligned: bool, columns: int) -> int | None:
    """Return the place of the first tile of a kind that is wide enough, or None."""
    fitting = (
        k
        for k, t in enumerate(choices)
        if t.kind is kind and t.aligned is aligned and t.columns >= columns
    )
    return next(fitting, None)


def _spans(tile: Tile, lines: int, pitch: int) -> int:
    """Return the distance in memory from the first element of a tile to the end of its last line,
    if the matrix has ``lines`` lines."""
    return (min(tile.lines, lines) - 1) * pitch + tile.columns


def _multiple(most: int, size: int, vector: int) -> int:
    """Return the largest count up to ``most`` for which ``count * size`` is a multiple of
    ``vector``; ``most`` if there is none."""
    return next((n for n in range(most, 0, -1) if n * size % vector == 0), most)


def _powers(first: int, last: int) -> list[int]:
    return [1 << k for k in range(first.bit_length() - 1, last.bit_length())]


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
