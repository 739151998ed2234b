"""How the CUDA backend cuts weights: make_plan of csrc/cuda/plan.h, compiled for the host.

What a plan says is spelled out element by element here, apart from the kernels, which
tests/cuda/test_simt.py holds to the same plans.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wnkernel.backends.triton import plan as plans

from ..processes import ROOT
from ..simt.build import missing
from ..simt.cases import FEW_LINES, MOST_LINES, VECTOR_BYTES
from ..simt.process import Worker, worker
from ..simt.protocol import ROWS, RUNS, STRIPS, Numbers, Plan, Plans, View

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

ITEMSIZES = (2, 4, 8)
THREADS, WARP, ROW_VECTORS, STRIP_BYTES = 256, 32, 4, 128
FILL, SPLIT_FROM, STRIP_TILES = 384, 8, 2
STRIP_PARTS, TILES_OF_MORE_PARTS = 128, 16
"""Numbers that csrc/cuda/plan.h gives reasons for."""
INT32 = 2**31


def vectors_of_tile(p: Plan) -> int:
    """Of a thread."""
    return 8 if p.vector == 1 else 4


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with worker(tmp_path_factory, pairs=()) as process:
        yield process


def vectors(itemsize: int) -> tuple[int, ...]:
    """Elements of the widest access, without alignment and with it."""
    return 1, VECTOR_BYTES // itemsize


def longest_row(view: View) -> int:
    """Elements of the longest row that a block holds in registers."""
    vector = view.vector if view.inner % view.vector == 0 else 1
    return THREADS * vector * (4 if vector == 8 else 8)


@st.composite
def views(draw: st.DrawFn, most: int) -> View:
    """Of ``most`` elements at most; each size is small, or large, or near a limit."""
    left, sizes = most, []
    for _ in range(3):
        near = st.sampled_from([1, 8, 16, 17, 32, 33, 64, 65, 128, 512, 1024, 2048, 4096, 8192])
        size = draw(st.integers(1, 70) | near | st.integers(1, left))
        sizes.append(min(size, left))
        left //= sizes[-1]
    itemsize = draw(st.sampled_from(ITEMSIZES))
    return View(*draw(st.permutations(sizes)), itemsize, draw(st.sampled_from(vectors(itemsize))))


def plan_of(planner: Worker, view: View) -> Plan:
    (plan,) = planner.ask(Plans([view]))
    return plan


def sharing(p: Plan) -> int:
    """Blocks of a row or strip."""
    return -(-p.parts // p.per_block)


def columns(p: Plan) -> int:
    """Of a strip, with those that it does not have."""
    return p.vector << p.log_x


def places(p: Plan) -> tuple[np.ndarray, ...]:
    """Of every vector: its block, where it begins, and its column in a strip; as the kernels
    compute them."""
    block, step, k, thread = np.ogrid[
        : p.blocks,
        : p.per_block * p.per_part if p.kind != ROWS else max(1, ROW_VECTORS >> p.log_across),
        : vectors_of_tile(p) if p.kind != ROWS else 1 << p.log_across, :THREADS,
    ]  # fmt: skip
    x, y, height = thread & ((1 << p.log_x) - 1), thread >> p.log_x, THREADS >> p.log_x
    if p.kind == ROWS:
        row = (block * max(1, ROW_VECTORS >> p.log_across) + step) * height + y
        column = x + (k << p.log_x)
        start = row * p.inner + column * p.vector
        there = (row < p.rows) & (column < p.width)
    else:
        strip, first = block // sharing(p), block % sharing(p) * p.per_block * p.per_part
        tile = first + step
        below, beside = tile // p.across, tile % p.across
        line = (below * (vectors_of_tile(p) >> p.log_across) + (k >> p.log_across)) * height + y
        side = (beside << p.log_across) + (k & ((1 << p.log_across) - 1))
        column = (side << p.log_x) + x
        origin = strip * (p.strip_rows if p.kind == STRIPS else 1) * p.inner
        width = p.width
        if p.kind == STRIPS:
            width = np.minimum(width, (p.pitch - origin) // p.vector)
        start = origin + line * p.pitch + column * p.vector
        there = (tile < p.tiles) & (line < p.lines) & (column < width) & (start < p.numel)
    each = np.broadcast_arrays(block, start, column)
    return tuple(a[there] for a in each)


def check_places(view: View, p: Plan) -> None:
    """Every element is in one block, with its row, and vectors are whole and aligned."""
    block, start, column = places(p)
    assert p.numel % p.vector == 0
    assert (start % p.vector == 0).all()
    assert np.array_equal(np.sort(start), np.arange(0, p.numel, p.vector))
    assert len(np.unique(block)) == p.blocks
    for j in (0, p.vector - 1):
        row = (start + j) // view.inner % view.rows
        if p.kind == RUNS:
            assert (row == block // sharing(p)).all()
        if p.kind == STRIPS:
            own = column * p.vector + j
            assert (own < columns(p)).all()
            first = block // sharing(p) * p.strip_rows
            assert (row == first + own // p.inner % p.strip_rows).all()


def check_limits(view: View, p: Plan) -> None:
    assert (p.numel, p.rows, p.inner) == (prod(view[:3]), view.rows, view.inner)
    assert p.vector in (1, view.vector)
    if p.kind == ROWS:
        assert view.outer == 1
        assert p.width <= 1 << p.log_x + p.log_across < 2 * p.width
        alone, several = p.width <= WARP, p.width <= THREADS * ROW_VECTORS
        assert p.log_across == (0 if alone else 2 if several else 3)
        assert (p.parts, p.per_part, p.per_block, p.partial_sums) == (1, 1, 1, 0)
        return
    height = (THREADS >> p.log_x) * (vectors_of_tile(p) >> p.log_across)
    side = p.width if p.kind == RUNS else 1 << p.log_x
    assert p.across == -(-side // (1 << p.log_x << p.log_across))
    assert p.tiles == -(-p.lines // height) * p.across < INT32
    assert (p.parts - 1) * p.per_part < p.tiles <= p.parts * p.per_part
    whole = p.rows if p.kind == RUNS else -(-p.rows // p.strip_rows)
    assert (p.parts > 1) == (p.tiles >= SPLIT_FROM and 2 * whole <= FILL)
    assert p.parts == 1 or p.parts * whole <= FILL
    assert p.blocks == whole * sharing(p)
    kept = columns(p) if p.kind == STRIPS else 1
    assert p.partial_sums == (whole * p.parts * kept if p.parts > 1 else 0)
    if p.kind == STRIPS:
        assert p.parts == 1 or p.per_part >= STRIP_TILES
        assert p.parts <= max(STRIP_PARTS, p.tiles // TILES_OF_MORE_PARTS)
        assert columns(p) == (STRIP_BYTES // view.element_bytes if p.vector > 1 else WARP)
        assert p.strip_rows * p.inner <= p.width * p.vector <= columns(p)


@settings(max_examples=200)
@given(view=views(20_000))
def test_every_element_is_in_one_block(planner, view):
    p = plan_of(planner, view)
    check_limits(view, p)
    check_places(view, p)


@settings(max_examples=10)
@given(data=st.data())
def test_every_element_is_in_one_block_of_a_split_row(planner, data):
    """Few rows, and columns of few strips."""
    itemsize = data.draw(st.sampled_from(ITEMSIZES))
    vector = data.draw(st.sampled_from(vectors(itemsize)))
    rows = data.draw(st.sampled_from([1, 2, 3, 5, 16, 40]))
    inner = data.draw(st.integers(1, min(70, 200 // rows)))
    length = data.draw(st.integers(3 << 16, 1 << 18))  # 8 tiles of 128 lines of 200 elements
    outer = -(-length // (rows * inner))
    for view in (
        View(outer, rows, inner, itemsize, vector),
        View(1, rows, length, itemsize, vector),
    ):
        p = plan_of(planner, view)
        assert p.parts > 1
        check_limits(view, p)
        check_places(view, p)


@settings(max_examples=300)
@given(view=views(2**38))
def test_limits_of_the_largest_weights(planner, view):
    """A quarter of a tera-element: fields of 32 bits hold what they should."""
    check_limits(view, plan_of(planner, view))


# At every threshold, one element to either side of it.
EDGES = [
    *((1, 3, n + d) for n in (16, 32, 64, 128, 512, 2048, 4096, 8192) for d in (-1, 0, 1, 8)),
    *((3, 5, n + d) for n in (16, 32, 64) for d in (-1, 0, 1, 8)),
    *((3, n + d, 1) for n in (16, 32, 64) for d in (-1, 0, 1)),
    (7, 3, 3), (100, 3, 3), (2, 2, 8), (33, 2, 64), (1, 1, 1), (9000, 1, 1), (1, 9000, 1),
    (1, 1, 1 << 17), (1 << 17, 1, 1), ((1 << 17) + 1, 3, 1), (60_000, 9, 2),
]  # fmt: skip


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_edges(planner, itemsize):
    every = [View(*e, itemsize, vector) for e in EDGES for vector in vectors(itemsize)]
    for view, p in zip(every, planner.ask(Plans(every)), strict=True):
        check_limits(view, p)
        check_places(view, p)
    kinds = {(p.kind, p.vector > 1, p.parts > 1) for p in planner.ask(Plans(every))}
    rows = {(ROWS, wide, False) for wide in (False, True)}
    assert kinds == rows | {(k, w, s) for k in (RUNS, STRIPS) for w in (0, 1) for s in (0, 1)}


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_rows_that_fit_are_read_once(planner, itemsize):
    for vector in vectors(itemsize):
        most = longest_row(View(1, 3, 8 * vector, itemsize, vector))
        for inner, kind in ((most, ROWS), (most + vector, RUNS)):
            p = plan_of(planner, View(1, 3, inner, itemsize, vector))
            assert (p.kind, p.vector) == (kind, vector)


def real_views() -> Iterator[tuple[int, int, int]]:
    """``[outer, rows, inner]`` of the weights of benchmarks/shapes.csv, contiguous."""
    with (ROOT / "benchmarks" / "shapes.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            shape = tuple(map(int, line["shape"].split("x")))
            if line["dim"] == "none" or shape[k := int(line["dim"])] == 1:
                yield 1, 1, prod(shape)
            else:
                yield prod(shape[:k]), shape[k], prod(shape[k + 1 :])


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_weights_of_real_models(planner, itemsize):
    """Rows that fit are read once, in 16-byte accesses where they hold whole ones."""
    every = [View(*view, itemsize, VECTOR_BYTES // itemsize) for view in real_views()]
    kinds = Counter()
    for view, p in zip(every, planner.ask(Plans(every)), strict=True):
        check_limits(view, p)
        kinds[p.kind] += 1
        if view.outer == 1 and view.inner <= longest_row(view):
            assert p.kind == ROWS
            assert (p.vector > 1) == (view.inner % view.vector == 0)
    assert kinds[ROWS] > 100


@pytest.mark.parametrize(
    ("view", "blocks"),
    [
        ((768 * 48, 128, 1), (192, 384)),
        ((1, 1, 768 * 48 * 128), (288, 384)),
        ((1024 * 64, 128, 1), (256, 344)),
        ((2048 * 2048, 5, 1), (256, 373)),
        ((1, 1, 4_700_000), (287, 383)),
        ((1, 1, 786_432), (96, 192)),
        ((1, 1, 262_136), (32, 64)),
        ((1, 1, 262_143), (128, 128)),
        ((4095, 64, 1), (16, 32)),
        ((512, 256, 16), (64, 128)),
    ],
    ids=str,
)
def test_few_rows_with_much_data_are_spread_over_a_card(planner, view, blocks):
    """In halves and in float32. Odd sizes take other tiles, the last is enough for a card as it
    is."""
    for itemsize, expected in zip((2, 4), blocks, strict=True):
        p = plan_of(planner, View(*view, itemsize, VECTOR_BYTES // itemsize))
        assert p.blocks == expected


CARDS = {"one": 1, "four": 4, "L4": 58, "A100": 108, "4090": 128, "H100": 132, "B200": 148}
"""Processors."""


@settings(max_examples=100)
@given(
    view=views(2**38), places=st.sampled_from([3 * n for n in CARDS.values()]) | st.integers(1, 999)
)
def test_a_card_chooses_blocks_and_nothing_else(planner, view, places):
    """Waves as short as they can be together, and of equals the fewest."""
    p, here = planner.ask(Plans([view])) + planner.ask(Plans([view], places))
    assert here == p._replace(per_block=here.per_block, blocks=here.blocks)
    whole = here.blocks // sharing(here)

    def length(per_block: int) -> tuple[int, int]:
        waves = -(-whole * -(-p.parts // per_block) // places)
        return waves * per_block, waves

    assert length(here.per_block) == min(map(length, range(1, p.parts + 1)))


@settings(max_examples=20)
@given(data=st.data())
def test_every_element_is_in_one_block_of_every_card(planner, data):
    view = View(
        *data.draw(st.sampled_from([(1, 1, 1 << 17), (9000, 3, 1), (5170, 2, 3), (230, 2, 72)])),
        4,
        4,
    )
    (p,) = planner.ask(Plans([view], data.draw(st.integers(1, 50))))
    assert p.parts > 1
    check_limits(view, p)
    check_places(view, p)


def test_rows_of_few_tiles_are_not_split(planner):
    """A second launch costs more than it saves there."""
    for split, views in (
        (False, ((1, 1, 7 * 4096), (7 * 128, 64, 1), (1, 193, 1 << 15))),
        (True, ((1, 1, 7 * 4096 + 4), (7 * 128 + 1, 64, 1), (1, 192, 1 << 15))),
    ):
        for view in views:
            assert (plan_of(planner, View(*view, 4, 4)).parts > 1) == split


def test_numbers_are_those_of_the_sources(planner):
    """The tests have their own. Those that Triton's kernels have, too, are the same there."""
    n = planner.ask(Numbers())
    assert (n.threads, n.warp, n.row_vectors) == (THREADS, WARP, ROW_VECTORS)
    assert (n.vector_bytes, n.strip_bytes) == (VECTOR_BYTES, STRIP_BYTES)
    assert (n.fill, n.split_from, n.strip_tiles) == (FILL, SPLIT_FROM, STRIP_TILES)
    assert (n.strip_parts, n.tiles_of_more_parts) == (STRIP_PARTS, TILES_OF_MORE_PARTS)
    assert (n.few_lines, n.most_lines) == (FEW_LINES, MOST_LINES)
    assert (n.threads, n.vector_bytes) == (plans.THREADS, plans.VECTOR_BYTES)
