"""How the Triton backend cuts weights: pure Python, no Triton needed.

What a plan says is spelled out element by element here, apart from the kernels, which
tests/triton/test_tiles.py holds to the same plans.
"""

from __future__ import annotations

from collections import Counter
from unittest import mock

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from wnkernel.backends.triton import plan as plans
from wnkernel.backends.triton.plan import STRIP, VECTOR_BYTES, Kind, Plan, plan, tiles
from wnkernel.backends.triton.tables import (
    BACKWARD,
    FORWARD,
    HEADER,
    Kept,
    Weight,
    bits_of,
    build,
    workspace,
)

from ..processes import ROOT
from .plans import (
    ITEMSIZES,
    check_cells,
    check_limits,
    problems,
    real_views,
    vectors,
    views,
)

GRID_LIMIT = 2**31 - 1
"""Programs in a launch at most."""


@settings(max_examples=100)
@given(problems(20_000))
def test_every_element_is_in_one_tile(arguments):
    check_limits(*arguments)
    check_cells(*arguments)


@settings(max_examples=200)
@given(problems(20_000), st.integers(1, 600), st.integers(1, 5))
def test_every_element_is_in_one_tile_of_a_split_row(arguments, fill, split_tiles):
    early = {"FILL": fill, "SPLIT_TILES": split_tiles}
    with mock.patch.multiple(plans, **early):
        p, _ = check_limits(*arguments)
        check_cells(*arguments)
    if p.split > 1:
        # No more programs than it takes, but for those of a last row or strip.
        assert (p.split - 1) * (p.programs // p.split) < fill


@settings(max_examples=200)
@given(problems(2**40))
def test_limits_of_the_largest_weights(arguments):
    assume(arguments[1] <= GRID_LIMIT)
    p, _ = check_limits(*arguments)
    assert p.programs <= GRID_LIMIT
    if p.split > 1:
        assert (p.split - 1) * (p.programs // p.split) < plans.FILL


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


@pytest.mark.parametrize(
    "pitch", [2**k + d for k in (18, 19, 20, 25, 26, 30, 31, 33) for d in (-8, -1, 0, 8)]
)
def test_offsets_within_a_tile_fit_in_32_bits(pitch):
    for itemsize in ITEMSIZES:
        for outer in (2, 3, 40, 100):
            for inner in (1, 8, 64, 128):
                check_limits(outer, pitch // inner, inner, itemsize, VECTOR_BYTES // itemsize)


def test_every_column_of_a_wide_matrix_is_in_one_tile():
    p, tile = check_cells(3, 600_000, 1, 4, 4)
    assert tile.kind is Kind.STRIPS
    assert p.programs == 600_000 // STRIP


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


@st.composite
def weights(draw, itemsize: int):
    eps = draw(st.sampled_from([0.0, 1e-12, 0.5]))
    vector = draw(st.sampled_from(vectors(itemsize)))
    return Weight(*draw(views(2**22)), vector, eps)


@settings(max_examples=60)
@given(
    st.data(),
    st.sampled_from(ITEMSIZES),
    st.sampled_from([FORWARD, BACKWARD]),
)
def test_a_weight_has_its_own_plan_whatever_its_neighbours(data, itemsize, direction):
    """A table holds the plans that weights have alone, in lines that programs find back to."""
    columns = direction.columns
    many = data.draw(st.lists(weights(itemsize), min_size=1, max_size=6))
    assume(sum(plan(*w[:3], itemsize, w.vector).programs for w in many) < 100_000)
    arrays = range(len(HEADER), len(columns))
    addresses = [[2**61 + 8 * (array + 64 * k) for k in range(len(many))] for array in arrays]
    table = build(many, itemsize, direction)
    line_of = table.line_of[: table.programs].tolist()
    to_finish = table.line_of[table.programs :].tolist()
    assert len(to_finish) == table.programs_to_finish
    found, reserved = [], []
    for k, line in enumerate(table.at(addresses).tolist()):
        row = dict(zip(columns, line, strict=True))
        p = Plan(*line[: len(Plan._fields)])
        found.append([list(each) for each in zip(*addresses, strict=True)].index(line[arrays[0] :]))
        w = many[found[-1]]
        assert p == plan(*w[:3], itemsize, w.vector)
        assert row["eps_bits"] == bits_of(w.eps)
        assert line_of[row["first"] : row["first"] + p.programs] == [k] * p.programs
        again = to_finish[row["first_to_finish"] :][: p.programs if p.split > 1 else 0]
        assert again == [k] * len(again)
        assert len(again) == (p.programs if p.split > 1 else 0)
        needed = workspace(p, itemsize, direction)
        assert (needed > 0) == (p.split > 1)
        reserved.append((row["partials"], row["partials"] + needed))
    assert sorted(found) == list(range(len(many)))
    assert len(line_of) == sum(plan(*w[:3], itemsize, w.vector).programs for w in many)
    end = 0
    for start, stop in sorted(reserved):  # nobody's partial sums lie in another's
        assert start >= end or start == stop
        end = max(end, stop)
    assert table.workspace == end
    kinds = {tiles(itemsize)[line[0]].kind for line in table.lines.tolist()}
    assert table.rows_only == (kinds == {Kind.ROWS})


def test_the_documentation_counts_the_integers_of_a_line():
    lengths = f"{len(FORWARD.columns)} or {len(BACKWARD.columns)} integers"
    assert lengths in (ROOT / "docs" / "gpu.md").read_text()


def test_what_was_used_last_is_kept():
    kept, made = Kept(2), []

    def get(key):
        return kept.get(key, lambda: made.append(key) or key)

    for key in ("a", "b", "a", "c", "a"):  # c takes the place of b, which was used before a
        assert get(key) == key
    assert made == ["a", "b", "c"]
    get("b")
    assert made == ["a", "b", "c", "b"]
