"""How the Triton backend cuts weights: pure Python, no Triton needed.

What a plan says is spelled out element by element here, apart from the kernels, which
tests/test_triton_tiles.py holds to the same plans.
"""

from __future__ import annotations

import csv
from collections import Counter
from math import prod
from unittest import mock

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from wnkernel.backends.triton import launch_table, tables
from wnkernel.backends.triton.launch_table import (
    MAX_PARTIALS,
    MAX_SPLIT,
    OFFSET_LIMIT,
    SPLIT_FROM,
    VECTOR_BYTES,
    Kind,
    Plan,
    Tile,
    plan,
    tiles,
)
from wnkernel.backends.triton.tables import (
    BACKWARD_PLANES,
    FORWARD_PLANES,
    KEPT,
    Tables,
    Weight,
    bits_of,
    build,
    workspace,
)

from .processes import ROOT

ITEMSIZES = (2, 4, 8)
GRID_LIMIT = 2**31 - 1
"""Programs in a launch at most."""


def vectors(itemsize: int) -> tuple[int, ...]:
    """Elements of the widest access, without alignment and with it."""
    return 1, VECTOR_BYTES // itemsize


@st.composite
def views(draw, most: int):
    """``(outer, rows, inner)`` of ``most`` elements at most, each of them small, or large."""
    left, sizes = most, []
    for _ in range(3):
        near = st.sampled_from([1, 8, 16, 17, 32, 33, 64, 512, 1024, 2048, 4096, 8192])
        size = draw(st.integers(1, 70) | near | st.integers(1, left))
        sizes.append(min(size, left))
        left //= sizes[-1]
    return tuple(draw(st.permutations(sizes)))


@st.composite
def problems(draw, most: int):
    """Arguments of plan()."""
    itemsize = draw(st.sampled_from(ITEMSIZES))
    return (*draw(views(most)), itemsize, draw(st.sampled_from(vectors(itemsize))))


def cells(p: Plan, tile: Tile):
    """``(program, start, columns, rows)`` of every line of every tile: the elements from ``start``
    on, in memory order, one for each column, and the rows that they belong to."""
    for program in range(p.programs):
        part, chunk = divmod(program, p.split)
        if tile.kind is Kind.ROWS:
            for row in range(part * tile.lines, min((part + 1) * tile.lines, p.lines)):
                yield program, row * p.pitch, p.width, np.full(p.width, row)
            continue
        origin = part * p.strip_rows * p.inner
        width = p.width if tile.kind is Kind.RUN else min(p.width, p.pitch - origin)
        across = -(-width // tile.columns)
        for k in range(chunk * p.per_chunk, min((chunk + 1) * p.per_chunk, p.tiles)):
            down, aside = divmod(k, across)
            columns = np.arange(aside * tile.columns, min((aside + 1) * tile.columns, width))
            rows = np.full(columns.size, part)
            if tile.kind is Kind.SEGMENTS:
                rows = part * p.strip_rows + columns // p.inner % p.rows
            for line in range(down * tile.lines, min((down + 1) * tile.lines, p.lines)):
                start = origin + line * p.pitch + int(columns[0])
                there = min(columns.size, p.numel - start)  # folded, the last line may end early
                yield program, start, there, rows[:there]


def check_cells(outer, rows, inner, itemsize, vector):
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


def check_limits(outer, rows, inner, itemsize, vector):
    p = plan.__wrapped__(outer, rows, inner, itemsize, vector)
    tile = tiles(itemsize)[p.tile]
    assert not tile.aligned or vector > 1
    assert (min(tile.lines, p.lines) - 1) * p.pitch + tile.columns <= OFFSET_LIMIT
    if tile.lines > 1:  # the pitch itself is then a 32-bit number
        assert p.pitch < OFFSET_LIMIT
    if tile.kind is not Kind.RUN:
        assert p.width <= tile.columns
    if tile.kind is Kind.SEGMENTS:
        assert p.strip_rows * inner <= tile.columns
        assert p.split * tile.columns <= MAX_PARTIALS
    if tile.kind is Kind.ROWS:
        assert (p.per_chunk, p.tiles, p.split) == (1, 1, 1)
    assert 1 <= p.split <= MAX_SPLIT
    assert p.split == 1 or outer * rows * inner >= launch_table.SPLIT_FROM
    assert (p.split - 1) * p.per_chunk < p.tiles <= p.split * p.per_chunk
    assert p.programs % p.split == 0
    assert p.numel == outer * rows * inner
    return p, tile


@settings(max_examples=100, deadline=None)
@given(problems(20_000))
def test_every_element_is_in_one_tile(arguments):
    check_limits(*arguments)
    check_cells(*arguments)


@settings(max_examples=200, deadline=None)
@given(problems(20_000), st.integers(1, 600), st.integers(1, 5))
def test_every_element_is_in_one_tile_of_a_split_row(arguments, fill, split_tiles):
    early = {"SPLIT_FROM": 0, "FILL": fill, "SPLIT_TILES": split_tiles}
    with mock.patch.multiple(launch_table, **early):
        p, _ = check_limits(*arguments)
        check_cells(*arguments)
    if p.split > 1:
        # No more programs than it takes, but for those of a last row or strip.
        assert (p.split - 1) * (p.programs // p.split) < fill


@settings(max_examples=200, deadline=None)
@given(problems(2**40))
def test_limits_of_the_largest_weights(arguments):
    assume(arguments[1] <= GRID_LIMIT)
    p, _ = check_limits(*arguments)
    assert p.programs <= GRID_LIMIT
    if p.split > 1:
        assert (p.split - 1) * (p.programs // p.split) < launch_table.FILL


# A few that hypothesis may miss: at every threshold, one element to either side of it.
EDGES = [
    *((1, 3, inner) for n in (16, 64, 512, 2048, 4096, 8192) for inner in (n - 1, n, n + 1)),
    *((3, 5, inner) for n in (16, 32) for inner in (n - 1, n, n + 1)),
    *((3, rows, 1) for n in (16, 32, 64) for rows in (n - 1, n, n + 1)),
    (7, 3, 3), (100, 3, 3), (2, 2, 8), (33, 2, 64), (1, 1, 1), (9000, 1, 1), (1, 9000, 1),
]  # fmt: skip


@pytest.mark.parametrize("itemsize", ITEMSIZES)
@pytest.mark.parametrize("view", EDGES, ids=str)
def test_edges(view, itemsize):
    for vector in vectors(itemsize):
        check_limits(*view, itemsize, vector)
        check_cells(*view, itemsize, vector)


@pytest.mark.parametrize("pitch", [2**k + d for k in (18, 19, 20, 31, 33) for d in (-1, 0, 8)])
def test_offsets_within_a_tile_fit_in_32_bits(pitch):
    for itemsize in ITEMSIZES:
        for inner in (1, 8, 64, 128):
            check_limits(40, pitch // inner, inner, itemsize, VECTOR_BYTES // itemsize)


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_aligned_tiles_have_shapes_of_their_own(itemsize):
    shapes = {
        aligned: {(t.lines, t.columns) for t in tiles(itemsize) if t.aligned is aligned}
        for aligned in (True, False)
    }
    assert not shapes[True] & shapes[False]


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_a_tile_is_one_of_a_few(itemsize):
    """Shapes do not add any: that is what bounds the number of compiled variants."""
    assert len(tiles(itemsize)) == len(set(tiles(itemsize))) <= 18
    for tile in tiles(itemsize):
        for n in (tile.lines, tile.columns):
            assert n == 1 << (n.bit_length() - 1)  # Triton's arange() takes nothing else


def real_views():
    """``(shape, outer, rows, inner)`` of the weights of benchmarks/shapes.csv, contiguous."""
    with (ROOT / "benchmarks" / "shapes.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            shape = tuple(map(int, line["shape"].split("x")))
            if line["dim"] == "none" or shape[k := int(line["dim"])] == 1:
                yield shape, 1, 1, prod(shape)
            else:
                yield shape, prod(shape[:k]), shape[k], prod(shape[k + 1 :])


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_rows_of_real_models_are_read_once(itemsize):
    """Rows that fit on chip, in 16-byte accesses where they hold whole ones."""
    vector = VECTOR_BYTES // itemsize
    kinds = Counter()
    for shape, outer, rows, inner in real_views():
        _, tile = check_limits(outer, rows, inner, itemsize, vector)
        kinds[tile.kind] += 1
        if outer == 1 and inner <= (8192 if itemsize < 8 else 2048) and inner % vector == 0:
            assert tile.kind is Kind.ROWS, shape
            assert tile.aligned == (inner > 16), shape
            assert inner <= 16 or inner > tile.columns // 2 or tile.columns == 64, shape
    assert kinds[Kind.ROWS] > 100


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(
    "view",
    [(768 * 48, 128, 1), (1, 1, 768 * 48 * 128), (1024 * 64, 128, 1), (1, 1, 4_700_000)],
    ids=str,
)
def test_few_rows_with_much_data_fill_a_card(view, itemsize):
    p, tile = check_limits(*view, itemsize, VECTOR_BYTES // itemsize)
    assert p.split > 1
    assert tile.aligned
    assert 200 <= p.programs <= 1000


def test_small_weights_are_not_split():
    """A second launch costs more than it saves there."""
    for view in ((1, 1, SPLIT_FROM - 8), (SPLIT_FROM // 64 - 1, 64, 1), (127, 8, 256)):
        assert plan(*view, 4, 4).split == 1
    assert plan(1, 1, SPLIT_FROM, 4, 4).split > 1


@st.composite
def weights(draw, itemsize: int):
    addresses = draw(st.lists(st.integers(0, 2**62), min_size=4, max_size=4))
    eps = draw(st.sampled_from([0.0, 1e-12, 0.5]))
    vector = draw(st.sampled_from(vectors(itemsize)))
    return Weight(*draw(views(2**22)), vector, eps, tuple(addresses))


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(ITEMSIZES), st.sampled_from([FORWARD_PLANES, BACKWARD_PLANES]))
def test_a_weight_has_its_own_plan_whatever_its_neighbours(data, itemsize, planes):
    """A table holds the plans that weights have alone, in lines that programs find back to."""
    many = data.draw(st.lists(weights(itemsize), min_size=1, max_size=6, unique=True))
    assume(sum(plan(*w[:3], itemsize, w.vector).programs for w in many) < 100_000)
    table = build(many, itemsize, planes)
    memory = table.memory.tolist()
    length = len(tables.HEADER) + 4
    assert table.lines == length * len(many)
    lines = [memory[k * length : (k + 1) * length] for k in range(len(many))]
    owners = memory[table.lines : table.lines + table.programs]
    to_finish = memory[table.lines + table.programs :]
    assert (len(owners), len(to_finish)) == (table.programs, table.programs_to_finish)
    found, reserved = [], []
    for k, line in enumerate(lines):
        row = dict(zip(tables.HEADER, line, strict=False))
        p = Plan(*line[: len(Plan._fields)])
        (w,) = [
            w
            for w in many
            if (bits_of(w.eps), *w.addresses) == tuple(line[len(tables.HEADER) - 1 :])
            and plan(*w[:3], itemsize, w.vector) == p
            and w not in found
        ][:1]
        found.append(w)
        assert owners[row["first"] : row["first"] + p.programs] == [k] * p.programs
        again = to_finish[row["first_to_finish"] :][: p.programs if p.split > 1 else 0]
        assert again == [k] * len(again)
        assert len(again) == (p.programs if p.split > 1 else 0)
        needed = workspace(p, itemsize, planes)
        assert (needed > 0) == (p.split > 1)
        reserved.append((row["partials"], row["partials"] + needed))
    assert sorted(found) == sorted(many)
    assert Counter(owners).total() == sum(plan(*w[:3], itemsize, w.vector).programs for w in many)
    end = 0
    for start, stop in sorted(reserved):  # nobody's partial sums lie in another's
        assert start >= end or start == stop
        end = max(end, stop)
    assert table.workspace == end
    kinds = {tiles(itemsize)[line[0]].kind for line in lines}
    assert table.rows_only == (kinds == {Kind.ROWS})


def test_tables_used_last_are_kept(monkeypatch):
    monkeypatch.setattr(tables, "KEPT", 2)
    kept, made = Tables(), []

    def get(key):
        return kept.get(key, lambda: made.append(key) or key)

    for key in ("a", "b", "a", "c", "a"):  # c takes the place of b, which was used before a
        assert get(key) == key
    assert made == ["a", "b", "c"]
    get("b")
    assert made == ["a", "b", "c", "b"]
    assert KEPT >= 8  # of some models: forward and backward, for a few dtypes
