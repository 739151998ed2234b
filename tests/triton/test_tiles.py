"""Every branch of the Triton kernels against the oracle: each tile, whole and split rows, extreme
rows, dtypes. tests/triton/test_plan.py says that all elements are in tiles; this, what is done
with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations

import pytest
import torch
from torch import Tensor

from wnkernel.backends.triton.plan import Kind

from .. import reference
from ..cases import DTYPES
from .cases import (
    Case,
    Result,
    assert_right,
    assert_right_forward,
    assert_same_bits,
    case,
    every_tile,
    fresh,
    needs_triton,
    plan_of,
    record_launches,
    rows_case,
    run,
    shift,
    split_early,
    view_for,
)

pytestmark = needs_triton


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    fresh(monkeypatch)


@pytest.fixture
def _split(monkeypatch):
    split_early(monkeypatch)


def in_a_list(c: Case) -> Result:
    """By the kernels for many weights."""
    other = case((3, 5), 0, c.v.dtype, g_dtype=c.g.dtype, out_dtype=c.out_dtype)
    return run([other, c])[1]


def alone_or_in_a_list(c: Case) -> Result:
    """By either, in turns of dtypes, and by both for float32; tests/triton/test_lists.py compares
    them, too."""
    match c.v.dtype:
        case torch.float16 | torch.float64:
            return run([c])[0]
        case torch.bfloat16:
            return in_a_list(c)
    alone, listed = run([c])[0], in_a_list(c)
    assert_same_bits(alone, listed)
    return alone


@pytest.mark.parametrize(("dtype", "tile"), every_tile(DTYPES))
def test_tiles(dtype, tile):
    c = rows_case(*view_for(tile, dtype), dtype)
    cut, used = plan_of(c)
    assert used == tile
    assert cut.programs > 1
    assert_right(c, alone_or_in_a_list(c))


@pytest.mark.usefixtures("_split")
@pytest.mark.parametrize(
    ("dtype", "tile"), [p for p in every_tile(DTYPES) if p.values[1].kind is not Kind.ROWS]
)
def test_tiles_of_split_rows(monkeypatch, dtype, tile):
    c = rows_case(*view_for(tile, dtype), dtype)
    cut, used = plan_of(c)
    assert used == tile
    assert cut.split > 1
    launches = record_launches(monkeypatch)
    assert_right(c, alone_or_in_a_list(c))
    assert [launch.finish for launch in launches[-4:]] == [0, 1, 0, 1]


# [outer, rows, inner], and what is odd about its strips of 32 columns (16 for float64).
STRIPS = {
    "folded": (171, 2, 3),  # four lines of six elements in one of a tile, the last has three
    "folded_aligned": (264, 2, 4),  # four lines of eight elements, the last as full as the others
    "folded_partial": (267, 2, 4),  # the last has three of them, whole vectors still
    "folded_once": (35, 5, 3),  # two lines, which no vectors fill
    "folded_few": (2, 2, 4),  # fewer lines than would fit
    "folded_columns": (271, 4, 1),  # rows are columns
    "narrower": (67, 20, 2),  # 40 columns: a strip and a quarter
    "narrower_odd": (67, 21, 2),
    "wide_rows": (35, 3, 15),  # two rows a strip, two columns left over
    "exact_rows": (35, 3, 16),
    "shortened": (67, 16, 3),  # eight rows of three are whole vectors, ten are not
    "columns": (67, 40, 1),
}


@pytest.mark.parametrize("name", STRIPS)
@pytest.mark.parametrize(
    ("dtype", "fill"), [(torch.bfloat16, 1), (torch.float64, 1), (torch.float32, 6)], ids=str
)
def test_strips(monkeypatch, name, dtype, fill):
    split_early(monkeypatch, fill)
    c = rows_case(*STRIPS[name], dtype)
    cut, tile = plan_of(c)
    assert tile.kind is Kind.STRIPS
    assert (cut.split > 1) == (fill > 1 and cut.tiles > 1)
    assert_right(c, run([c])[0])


def test_strips_are_odd_in_every_way(monkeypatch):
    """What the shapes above reach, for float32."""
    split_early(monkeypatch)
    cuts = [plan_of(rows_case(*view)) for view in STRIPS.values()]
    folded = [(p, tile) for p, tile in cuts if p.width == p.pitch]
    assert {(tile.aligned, p.numel % p.pitch > 0) for p, tile in folded} >= {
        (False, True), (True, True), (True, False)
    }  # fmt: skip
    strips = [(p, tile) for p, tile in cuts if p.width < p.pitch]
    assert {(tile.aligned, p.pitch % p.width > 0) for p, tile in strips} >= {
        (False, True), (True, True), (True, False)
    }  # fmt: skip
    assert any(p.width < tile.columns for p, tile in strips if tile.aligned)
    assert any(p.width < tile.columns for p, tile in strips if not tile.aligned)
    assert any(p.tiles % p.per_chunk for p, _ in cuts)  # a last program has fewer tiles
    assert any(p.programs > p.split > 1 for p, _ in cuts)


@pytest.mark.parametrize("fill", [1, 5], ids=["whole", "split"])
@pytest.mark.parametrize("view", [(1, 1, 8300), (1, 2, 3001), (33, 3, 140), (34, 2, 70)], ids=str)
def test_rows_across_many_tiles(monkeypatch, view, fill):
    """Runs that do not end where tiles do, in either direction."""
    split_early(monkeypatch, fill)
    c = rows_case(*view)
    cut, tile = plan_of(c)
    assert tile.kind is Kind.RUNS
    assert cut.tiles > 1
    assert (cut.split > 1) == (fill > 1)
    assert_right(c, run([c])[0])


@pytest.mark.parametrize("moved", ["v", "grad_w", "both"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_addresses_that_are_not_aligned(dtype, moved):
    """One array decides for all of them."""
    c = rows_case(1, 5, 64, dtype)
    aligned = run([c])[0]
    if moved != "grad_w":
        c = c._replace(v=shift(c.v))
        assert not plan_of(c)[1].aligned
    if moved != "v":
        c = c._replace(grad_w=shift(c.grad_w))
    alone = alone_or_in_a_list(c)
    assert_right(c, alone)
    if moved == "grad_w":
        assert torch.equal(alone.w, aligned.w)


SPLIT = [(1, 2, 3001), (140, 3, 5)]
"""Rows split in three, and strips: RUNS and STRIPS tiles."""

VIEWS = [(1, 3, 60), *SPLIT]

SIZES = {
    torch.float32: {"h": 1e30, "t": 1e-30, "l": 1e14, "s": 1e-14},
    torch.float64: {"h": 1e140, "t": 1e-130},
}
"""Of numbers whose squares leave the safe range, far and just so: huge, tiny, large, small. Those
of 1e200 would leave the oracle's, too."""

# The size of each third of the rows; some are ordinary or zero.
EXTREMES = ["hhh", "ttt", "1h1", "h1t", "t1h", "101", "0h0", "t0t", "1l1", "s1s", "sls"]


def thirds(v: Tensor, sizes: Sequence[float]) -> None:
    """Multiply thirds of the rows of ``[outer, rows, inner]``; the last row stays as it is."""
    rows = v[:, :-1]
    for part, size in zip(rows.tensor_split(3, 0 if len(v) > 1 else 2), sizes, strict=True):
        part.mul_(size)


def extreme(view: Sequence[int], dtype: torch.dtype, kinds: str) -> Case:
    c = rows_case(*view, dtype)
    sizes = SIZES[dtype] | {"1": 1.0, "0": 0.0}
    thirds(c.v, [sizes[kind] for kind in kinds])
    return c


@pytest.fixture
def _split_in_three(monkeypatch):
    split_early(monkeypatch, fill=6)


@pytest.mark.usefixtures("_split_in_three")
@pytest.mark.parametrize("view", SPLIT, ids=str)
@pytest.mark.parametrize(
    ("kinds", "dtype"),
    [(k, torch.float32) for k in EXTREMES] + [(k, torch.float64) for k in ("hhh", "t0t", "h1t")],
    ids=str,
)
def test_extreme_parts_of_split_rows(kinds, view, dtype):
    """Programs of one row choose their units apart, and have to agree on one."""
    c = extreme(view, dtype, kinds)
    assert plan_of(c)[0].split >= 3
    assert_right(c, run([c])[0])


@pytest.mark.usefixtures("_split_in_three")
@pytest.mark.parametrize("view", VIEWS, ids=str)
@pytest.mark.parametrize(
    ("kinds", "dtype"),
    [(k, torch.float32) for k in ("hhh", "ttt", "h1t")] + [("h1t", torch.float64)],
    ids=str,
)
def test_extreme_rows_that_are_as_long_as_g(kinds, view, dtype):
    """g = norm, as after initialisation: w = v, down to the smallest elements, and gradients of
    their size."""
    c = extreme(view, dtype, kinds)
    c = c._replace(g=reference.norm(c.v, c.dim).to(dtype))
    assert_right(c, run([c])[0])
    c.grad_w.mul_(SIZES[dtype][kinds[0]] ** 0.5)
    assert_right(c, run([c])[0])


@pytest.mark.usefixtures("_split")
@pytest.mark.parametrize("view", SPLIT, ids=str)
@pytest.mark.parametrize(
    ("bad", "kinds"),
    [(math.inf, "111"), (-math.inf, "hhh"), (math.nan, "111"), (math.nan, "t1h")],
    ids=str,
)
def test_a_bad_part_of_a_split_row(view, bad, kinds):
    """It spoils its own row, and no other."""
    c = extreme(view, torch.float32, kinds)
    clean = run([c])[0]
    c.v[-1, 0, -1] = bad
    assert plan_of(c)[0].split > 1
    got = run([c])[0]
    assert_right_forward(c, got)
    for name in got._fields:
        assert torch.equal(getattr(got, name)[:, 1:], getattr(clean, name)[:, 1:]), name
    assert not got.grad_g[0, 0].isfinite()


@pytest.mark.usefixtures("_split")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("view", SPLIT, ids=str)
def test_eps_in_split_rows(view, dtype):
    c = rows_case(*view, dtype)
    c.v[:, 1:] *= 0.25  # some rows below, some above
    norms = reference.norm(c.v, c.dim)
    for eps in (float(norms.min()) / 2, float(norms.min()) * 2, float(norms.max()) * 2):
        clamped = c._replace(eps=eps)
        assert_right(clamped, run([clamped])[0])
    assert plan_of(c)[0].split > 1
    zero = c._replace(v=c.v.clone(), eps=0.5)
    zero.v[:, 0] = 0
    got = run([zero])[0]
    assert_right(zero, got)
    assert got.w[:, 0].eq(0).all()


@pytest.mark.usefixtures("_split")
@pytest.mark.parametrize("dtype", SIZES, ids=str)
@pytest.mark.parametrize("view", VIEWS, ids=str)
@pytest.mark.parametrize("size", ["huge", "tiny"])
def test_eps_of_extreme_rows(view, dtype, size):
    """eps is compared in the unit of its row."""
    factor = SIZES[dtype][size[0]]
    c = rows_case(*view, dtype)
    c.v.mul_(factor)
    norms = reference.norm(c.v, c.dim)
    for eps in (float(norms.min()) / 2, float(norms.max()) * 2):
        clamped = c._replace(g=norms.to(dtype), eps=eps)
        assert_right(clamped, run([clamped])[0])


@pytest.mark.parametrize(("size", "eps"), [(1e36, 0.0), (1e-40, 0.0), (1e-20, 1e12)])
@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_ends_of_the_float_range(monkeypatch, view, size, eps):
    """Norms of almost 8.5e37, whose reciprocal is still normal, subnormal ones, and a bound that
    is too large to be scaled."""
    split_early(monkeypatch)
    c = rows_case(*view, eps=eps)
    c.v.clamp_(-2, 2).mul_(size)
    g = torch.ones_like(c.g) if eps else reference.norm(c.v, c.dim).float()
    c = c._replace(g=g)
    # The backward divides by norms as they are stored: subnormal ones have lost their digits.
    only_forward = size == 1e-40
    (assert_right_forward if only_forward else assert_right)(c, run([c])[0])


@pytest.mark.usefixtures("_split")
@pytest.mark.parametrize("view", VIEWS, ids=str)
@pytest.mark.parametrize("listed", [False, True], ids=["alone", "listed"])
def test_only_one_gradient_wanted(monkeypatch, view, listed):
    """Leaving out a gradient changes no bit of the other."""
    cases = [rows_case(*view) for _ in range(2 if listed else 1)]
    both = run(cases)
    n = len(cases)
    for need_v, need_g in (([True] * n, [False] * n), ([False] * n, [True] * n)):
        for got, want in zip(run(cases, need_v, need_g), both, strict=True):
            assert_same_bits(got._replace(grad_v=want.grad_v, grad_g=want.grad_g), want)
            assert (got.grad_v is None, got.grad_g is None) == (not need_v[0], not need_g[0])
            assert got.grad_v is None or torch.equal(got.grad_v, want.grad_v)
            assert got.grad_g is None or torch.equal(got.grad_g, want.grad_g)
    if listed:
        first, second = run(cases, [True, False], [False, True])
        assert torch.equal(first.grad_v, both[0].grad_v)
        assert torch.equal(second.grad_g, both[1].grad_g)
        assert first.grad_g is second.grad_v is None
    launches = record_launches(monkeypatch)
    run(cases, [False] * n, [False] * n)
    assert not [launch for launch in launches if "backward" in launch.kernel]


@pytest.mark.usefixtures("_split")
@pytest.mark.parametrize("view", [(1, 3, 64), (200, 3, 4)], ids=str)
@pytest.mark.parametrize(("dtype", "out_dtype"), list(permutations(DTYPES, 2)), ids=str)
def test_another_dtype_of_the_result(view, dtype, out_dtype):
    """The smallest dtype says how many elements a vector has."""
    g_dtype = DTYPES[(DTYPES.index(dtype) + DTYPES.index(out_dtype)) % 4]
    c = rows_case(*view, dtype, g_dtype=g_dtype, out_dtype=out_dtype)
    assert_right(c, in_a_list(c))


@pytest.mark.parametrize("size", [1e30, 1e-30])
@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_g_that_is_far_from_the_norm(monkeypatch, view, size):
    """g / norm, or g / norm in two steps, leaves the range of floats where w does not."""
    split_early(monkeypatch)
    c = rows_case(*view)
    c.v.mul_(1e14)
    c.g.fill_(size)
    assert_right_forward(c, run([c])[0])
