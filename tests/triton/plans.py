"""What a plan of the Triton backend says, spelled out element by element, and its limits."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from math import prod

import numpy as np
from hypothesis import strategies as st

from wnkernel.backends.triton import plan as plans
from wnkernel.backends.triton.plan import (
    MAX_PARTIALS,
    MAX_SPLIT,
    VECTOR_BYTES,
    Kind,
    Plan,
    Tile,
    plan,
    tiles,
)

from ..processes import ROOT

ITEMSIZES = (2, 4, 8)


def vectors(itemsize: int) -> tuple[int, ...]:
    """Elements of the widest access, without alignment and with it."""
    return 1, VECTOR_BYTES // itemsize


@st.composite
def views(draw: st.DrawFn, most: int) -> tuple[int, int, int]:
    """``(outer, rows, inner)`` of ``most`` elements at most, each of them small, or large."""
    left, sizes = most, []
    for _ in range(3):
        near = st.sampled_from([1, 8, 16, 17, 32, 33, 64, 512, 1024, 2048, 4096, 8192])
        size = draw(st.integers(1, 70) | near | st.integers(1, left))
        sizes.append(min(size, left))
        left //= sizes[-1]
    return tuple(draw(st.permutations(sizes)))


@st.composite
def problems(draw: st.DrawFn, most: int) -> tuple[int, ...]:
    """Arguments of plan()."""
    itemsize = draw(st.sampled_from(ITEMSIZES))
    return (*draw(views(most)), itemsize, draw(st.sampled_from(vectors(itemsize))))


def cells(p: Plan, tile: Tile) -> Iterator[tuple[int, int, int, np.ndarray]]:
    """``(program, start, columns, rows)`` of every line of every tile: the elements from ``start``
    on, in memory order, one for each column, and the rows that they belong to."""
    for program in range(p.programs):
        part, chunk = divmod(program, p.split)
        if tile.kind is Kind.ROWS:
            for row in range(part * tile.lines, min((part + 1) * tile.lines, p.lines)):
                yield program, row * p.pitch, p.width, np.full(p.width, row)
            continue
        origin = part * p.strip_rows * p.inner
        width = p.width if tile.kind is Kind.RUNS else min(p.width, p.pitch - origin)
        across = -(-width // tile.columns)
        for k in range(chunk * p.per_chunk, min((chunk + 1) * p.per_chunk, p.tiles)):
            down, aside = divmod(k, across)
            columns = np.arange(aside * tile.columns, min((aside + 1) * tile.columns, width))
            rows = np.full(columns.size, part)
            if tile.kind is Kind.STRIPS:
                rows = part * p.strip_rows + columns // p.inner % p.rows
            for line in range(down * tile.lines, min((down + 1) * tile.lines, p.lines)):
                start = origin + line * p.pitch + int(columns[0])
                there = min(columns.size, p.numel - start)  # folded, the last line may end early
                yield program, start, there, rows[:there]


def check_cells(outer: int, rows: int, inner: int, itemsize: int, vector: int) -> tuple[Plan, Tile]:
    """Every element is in one tile, with its row, and aligned tiles hold whole vectors."""
    p = plan.__wrapped__(outer, rows, inner, itemsize, vector)  # the cache knows no patches
    tile = tiles(itemsize)[p.tile]
    seen = np.zeros(outer * rows * inner, dtype=np.int64)
    owner, busy = {}, set()
    for program, start, count, row in cells(p, tile):
        assert 0 < count <= tile.columns
        busy.add(program)
        seen[start : start + count] += 1
        assert (np.arange(start, start + count) // inner % rows == row).all()
        for r in {int(row[0]), int(row[-1])}:
            assert owner.setdefault(r, program // p.split) == program // p.split
        if tile.aligned:
            assert start % vector == count % vector == 0
    assert (seen == 1).all()
    assert len(busy) == p.programs
    return p, tile


def check_limits(
    outer: int, rows: int, inner: int, itemsize: int, vector: int
) -> tuple[Plan, Tile]:
    """What kernels and cards take."""
    p = plan.__wrapped__(outer, rows, inner, itemsize, vector)
    tile = tiles(itemsize)[p.tile]
    assert not tile.aligned or vector > 1
    # Offsets are 32-bit numbers, and compared with one that counts whole vectors.
    assert (min(tile.lines, p.lines) - 1) * p.pitch + tile.columns <= 2**31 - vector
    if tile.lines > 1:
        assert p.pitch < 2**31
    if tile.kind is not Kind.RUNS:
        assert p.width <= tile.columns
    if tile.kind is Kind.STRIPS:
        assert p.strip_rows * inner <= tile.columns
        assert p.split * tile.columns <= MAX_PARTIALS
    if tile.kind is Kind.ROWS:
        assert (p.per_chunk, p.tiles, p.split) == (1, 1, 1)
    assert 1 <= p.split <= MAX_SPLIT
    assert p.split == 1 or p.tiles >= 2 * plans.SPLIT_TILES
    assert (p.split - 1) * p.per_chunk < p.tiles <= p.split * p.per_chunk
    assert p.programs % p.split == 0
    assert p.numel == outer * rows * inner
    return p, tile


def real_views() -> Iterator[tuple[tuple[int, ...], int, int, int]]:
    """``(shape, outer, rows, inner)`` of the weights of benchmarks/shapes.csv, contiguous."""
    with (ROOT / "benchmarks" / "shapes.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            shape = tuple(map(int, line["shape"].split("x")))
            if line["dim"] == "none" or shape[k := int(line["dim"])] == 1:
                yield shape, 1, 1, prod(shape)
            else:
                yield shape, prod(shape[:k]), shape[k], prod(shape[k + 1 :])
