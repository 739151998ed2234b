"""Every branch of the CUDA kernels against the oracle: the sources of csrc/cuda, run on the CPU by
the SIMT shim under AddressSanitizer and UndefinedBehaviorSanitizer.

tests/cuda/test_plan.py says that all elements are in blocks; this, what is done with them.
tests/cuda/test_mutants.py shows what these tests would find.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ..simt.build import missing
from ..simt.cases import (
    LARGE,
    ORDERS,
    PAIRS,
    Case,
    assert_ends_right,
    assert_right,
    assert_right_forward,
    case,
    differences,
    plan_of,
    run,
    run_forward,
    run_list,
    vector_of,
)
from ..simt.process import Worker, worker
from ..simt.protocol import ROWS, RUNS, STRIPS

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

F32 = PAIRS["f32"]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with worker(tmp_path_factory) as process:
        yield process


def check(kernels: Worker, c: Case) -> None:
    """The same bits whatever thread comes first, and the right ones."""
    lockstep, *others = (run(kernels, c, order) for order in ORDERS)
    assert_right(c, lockstep)
    for result in others:
        assert not differences(lockstep, result)


# Vectors of a row, at and around powers of two: 1 to 32 threads with a vector each, then a fourth
# as many with four, then a block with eight.
WIDTHS = [1, 2, 3, 5, 16, 17, 32, 33, 64, 129, 512, 1024, 1025, 2048]


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("width", WIDTHS)
def test_rows(kernels, width, aligned):
    vector = vector_of(torch.float32, aligned)
    for rows in (1, 2, 5):
        c = case((1, rows, width * vector), aligned=aligned)
        p = plan_of(kernels, c)
        assert (p.kind, p.vector) == (ROWS, vector)
        assert p.log_across == (0 if width <= 32 else 2 if width <= 1024 else 3)
        check(kernels, c)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("width", [3, 32, 33, 1024, 2048])
def test_rows_of_every_type(kernels, width, pair):
    for aligned in (True, False):
        vector = vector_of(PAIRS[pair].v, aligned)
        c = case((1, 3, width * vector), PAIRS[pair], aligned=aligned)
        p = plan_of(kernels, c)
        assert p.kind == (RUNS if vector == 8 and width == 2048 else ROWS)
        check(kernels, c)


@pytest.mark.parametrize("width", [1, 4, 32, 33, 128])
def test_blocks_of_rows_that_are_full_and_not(kernels, width):
    """One row less, and one more, than a number of full blocks."""
    p = plan_of(kernels, case((1, 1, 4 * width)))
    rows = (256 >> p.log_x) * max(1, 4 >> p.log_across)
    for count, blocks in (
        (rows - 1, 1),
        (rows, 1),
        (rows + 1, 2),
        (2 * rows, 2),
        (2 * rows + 1, 3),
    ):
        c = case((1, count, 4 * width))
        assert plan_of(kernels, c).blocks == blocks
        assert_right(c, run(kernels, c))


# [outer, rows, inner], and what is odd about its runs.
RUNS_OF = {
    "long": (1, 2, 8196),  # one vector more than fits into registers
    "long_odd": (1, 2, 8201),  # single elements, in a last tile that is almost empty
    "whole": (1, 1, 14_000),
    "wide": (2, 2, 4100),  # a tile, and one vector in another beside it
    "wide_odd": (2, 2, 2061),
    "tile": (2, 3, 4096),  # of full tiles
    "short": (50, 3, 140),  # several lines of a tile, in a last tile with a few
    "short_odd": (67, 3, 33),
    "narrow": (70, 2, 36),  # one vector more than strips have
    "two": (2, 2, 65),
}


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("name", RUNS_OF)
def test_runs(kernels, name, aligned):
    c = case(RUNS_OF[name], aligned=aligned)
    p = plan_of(kernels, c)
    assert (p.kind, p.parts) == (RUNS, 1)
    check(kernels, c)


# The same of its strips of 32 columns.
STRIPS_OF = {
    "folded": (171, 2, 3),  # five lines of six elements side by side in one of a tile
    "folded_last": (321, 2, 3),  # a line with six elements in a tile of its own
    "folded_aligned": (264, 2, 4),  # four lines of eight elements, the last as full as the others
    "folded_partial": (267, 2, 4),  # the last line has three of them, whole vectors still
    "folded_once": (35, 5, 3),  # two lines, which no vectors fill
    "folded_few": (2, 2, 4),  # fewer lines than would fit
    "folded_columns": (271, 4, 1),  # rows are columns
    "folded_one": (300, 1, 1),  # one row
    "folded_run": (300, 1, 5),
    "narrower": (67, 20, 2),  # 40 columns: a strip and a quarter
    "narrower_odd": (67, 21, 2),
    "wide_rows": (35, 3, 15),  # two rows a strip, two columns left over
    "exact_rows": (35, 3, 16),
    "run": (40, 3, 32),  # a strip for every row
    "shortened": (67, 16, 3),  # eight rows of three are whole vectors, ten are not
    "columns": (67, 40, 1),
    "columns_odd": (67, 41, 1),
    "columns_exact": (300, 64, 1),  # three tiles
    "columns_few": (2, 33, 1),
}


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("name", STRIPS_OF)
def test_strips(kernels, name, aligned):
    c = case(STRIPS_OF[name], aligned=aligned)
    p = plan_of(kernels, c)
    assert (p.kind, p.parts) == (STRIPS, 1)
    check(kernels, c)


def test_strips_are_odd_in_every_way(kernels):
    """What the shapes above reach."""
    plans = [plan_of(kernels, case(view)) for view in STRIPS_OF.values()]
    folded = {(p.vector > 1, p.numel % p.pitch > 0) for p in plans if p.lines * p.pitch >= p.numel}
    assert folded == {(False, True), (False, False), (True, True), (True, False)}
    strips = [p for p in plans if p.width * p.vector < p.pitch]
    ends = {(p.vector > 1, p.pitch % (p.width * p.vector) > 0) for p in strips}
    assert ends >= {(False, True), (True, True), (True, False)}
    full = {(p.vector > 1, p.width == 1 << p.log_x) for p in strips}
    assert full == {(False, True), (False, False), (True, True), (True, False)}
    assert any(p.tiles > 1 for p in plans)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(
    "view",
    [(3, 2, 9000), (67, 3, 144), (267, 2, 4), (35, 5, 3), (67, 24, 3), (67, 136, 1)],
    ids=str,
)
def test_tiles_of_every_type(kernels, view, pair):
    for aligned in (True, False):
        c = case(view, PAIRS[pair], aligned=aligned)
        assert plan_of(kernels, c).kind != ROWS
        check(kernels, c)


# The same of rows and strips that blocks share, of 8 tiles and a few more.
SPLIT = {
    "row": (1, 1, 1 << 15),
    "row_odd": (1, 1, (1 << 14) + 1),
    "rows": (1, 3, 32_772),  # a last tile with one vector
    "runs": (230, 2, 72),
    "runs_odd": (120, 2, 79),
    "wide_runs": (4, 2, 4500),
    "columns": (1300, 44, 1),  # a last part with fewer tiles
    "columns_odd": (650, 45, 1),
    "columns_many": (1150, 17, 1),  # more parts than threads that add up those of a column
    "strips": (900, 10, 4),
    "strips_odd": (450, 11, 3),
    "folded": (5170, 2, 3),
    "folded_aligned": (3703, 2, 4),
    "folded_one": (1 << 15, 1, 1),
}


@pytest.mark.parametrize(
    ("name", "order"), [(name, ORDERS[k % len(ORDERS)]) for k, name in enumerate(SPLIT)]
)
def test_split_rows(kernels, name, order):
    """Orders of threads take turns."""
    c = case(SPLIT[name])
    p = plan_of(kernels, c)
    assert p.parts > 1
    assert p.kind == (RUNS if "r" in name[0] or "wide" in name else STRIPS)
    assert_right(c, run(kernels, c, order))


def test_split_rows_differ_in_every_way(kernels):
    """What the shapes above reach."""
    plans = [plan_of(kernels, case(view)) for view in SPLIT.values()]
    every = {(k, wide) for k in (RUNS, STRIPS) for wide in (False, True)}
    assert {(p.kind, p.vector > 1) for p in plans} == every
    strips = [p for p in plans if p.kind == STRIPS]
    assert {p.tiles % p.per_part > 0 for p in strips} == {True, False}
    assert any(p.parts > 256 >> p.log_x for p in strips)
    for kind in (RUNS, STRIPS):
        assert any(p.blocks > p.parts for p in plans if p.kind == kind)


@pytest.mark.parametrize("pair", [name for name in PAIRS if name != "f32"])
@pytest.mark.parametrize("view", [(450, 2, 72), (900, 72, 1)], ids=str)
def test_split_rows_of_every_type(kernels, view, pair):
    c = case(view, PAIRS[pair])
    assert plan_of(kernels, c).parts > 1
    assert_right(c, run(kernels, c))


@pytest.mark.parametrize(
    ("view", "parts", "aligned"),
    [((1, 1, (1 << 20) + 1), 257, False), ((8400, 5, 4), 33, True)],
    ids=str,
)
def test_more_parts_than_threads_add_up(kernels, view, parts, aligned):
    """Those of a row are for 256 threads, those of a column here for 32. Of a row they have several
    tiles only where it is as long as this one, and the last part has fewer."""
    c = case(view, aligned=aligned)
    p = plan_of(kernels, c)
    assert p.parts == parts
    assert p.per_part == 2
    assert_right_forward(c, *run_forward(kernels, [c]).results)


@pytest.mark.parametrize("view", LARGE, ids=str)
def test_offsets_take_more_than_32_bits(kernels, view):
    """8 and 16 GB, of which the first and the last block are touched."""
    assert_ends_right(kernels, view)


@pytest.mark.parametrize("g_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("pair", PAIRS)
def test_g_of_every_type(kernels, pair, g_dtype):
    views = ((1, 5, 24), (9, 3, 80), (40, 20, 2))
    for view in views:
        c = case(view, PAIRS[pair], g_dtype=g_dtype)
        assert_right(c, run(kernels, c))
    kinds = {plan_of(kernels, case(view, PAIRS[pair])).kind for view in views}
    assert kinds == {ROWS, RUNS, STRIPS}


@pytest.mark.parametrize("pair", [name for name in PAIRS if name.startswith("f32_")])
@pytest.mark.parametrize("view", [(1, 5, 24), (9, 3, 80), (40, 20, 2)], ids=str)
def test_half_results_are_casts(kernels, view, pair):
    """Bit for bit what rounding a float32 result gives."""
    half = case(view, PAIRS[pair])
    single = half._replace(grad_w=half.grad_w.float())
    (half_result,), (single_result,) = (run_list(kernels, [c]).results for c in (half, single))
    assert torch.equal(half_result.w, single_result.w.to(half.grad_w.dtype))
    for name in ("norm", "grad_v", "grad_g"):
        assert torch.equal(getattr(half_result, name), getattr(single_result, name)), name
