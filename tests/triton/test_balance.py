"""How the Triton backend spreads work: enough programs, none with much to do, few empty lanes."""

from __future__ import annotations

from math import prod

import pytest
from hypothesis import HealthCheck, assume, given, settings

from wnkernel.backends.triton.plan import (
    MAX_PARTIALS,
    SPLIT_TILES,
    STRIP,
    VECTOR_BYTES,
    Kind,
    Plan,
    Tile,
    plan,
    tiles,
)

from .plans import ITEMSIZES, check_limits, problems, vectors


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


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_programs_of_a_few_tiles_are_not_split(itemsize):
    """A second launch costs more than it saves there."""
    most = 2 * SPLIT_TILES - 1
    for vector in vectors(itemsize):
        for kind, view in ((Kind.RUNS, (1, 1, 0)), (Kind.STRIPS, (0, STRIP, 1))):
            tile = next(t for t in tiles(itemsize) if t.kind is kind and t.aligned is (vector > 1))
            for count, splits in ((most, False), (most + 1, True)):
                along = count * (tile.columns if kind is Kind.RUNS else tile.lines)
                p, used = check_limits(*(n or along for n in view), itemsize, vector)
                assert (used, p.tiles, p.split > 1) == (tile, count, splits)
    for view in ((1, 1, 3 * 1024), (1024, 3, 1), (96, 8, 256)):
        assert plan(*view, 4, 4).split == 1


@pytest.mark.parametrize("itemsize", ITEMSIZES)
@pytest.mark.parametrize("view", [(1, 1, 262_143), (1, 1, 200_000), (30_000, 7, 1)], ids=str)
def test_no_program_is_left_with_much_to_do_one_after_the_other(view, itemsize):
    """Whatever the tiles are: without 16-byte accesses they are a quarter as large."""
    for vector in vectors(itemsize):
        p, _ = check_limits(*view, itemsize, vector)
        assert p.per_chunk <= 2 * SPLIT_TILES or p.split * STRIP == MAX_PARTIALS


def lanes_used(p: Plan, tile: Tile) -> float:
    """The share of the places in tiles that have an element."""
    return p.numel / (p.programs // p.split * p.tiles * tile.lines * tile.columns)


LARGE = 1 << 20
"""Elements."""
FEW_LINES = 16
SHORT_RUNS = 2048
MOST_COLUMNS = 1 << 24


def is_exception(outer: int, rows: int, inner: int) -> bool:
    """Large weights that no tile suits, as no model has them."""
    if outer == 1:
        return inner == 1  # rows of one element, 64 of them in a tile of 16 columns
    if rows * inner > MOST_COLUMNS:  # lines of a tile may be too far apart for 32 bits
        return True
    if inner <= STRIP:  # columns of a few elements
        return outer < FEW_LINES
    return outer * inner < SHORT_RUNS  # rows of a few short runs, each row a program


@settings(max_examples=300, suppress_health_check=[HealthCheck.filter_too_much])
@given(problems(2**36))
def test_most_lanes_have_something_to_do(arguments):
    view = arguments[:3]
    assume(prod(view) >= LARGE and not is_exception(*view))
    assert lanes_used(*check_limits(*arguments)) > 0.1


@pytest.mark.parametrize(
    "view", [(512, 600_000, 1), (512, 200_000, 5), (100, 2**24, 1), (16, 4096, 4096)], ids=str
)
@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_most_lanes_of_the_widest_matrices_have_something_to_do(view, itemsize):
    for vector in vectors(itemsize):
        assert lanes_used(*check_limits(*view, itemsize, vector)) > 0.5
