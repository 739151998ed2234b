"""The CUDA kernels at the ends of the float range, with bounds on norms, and with one gradient
only; see tests/cuda/test_simt.py."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pytest
import torch

from .. import reference, wide_reference
from ..cases import DTYPES, ENDS, rounded_past_eps
from ..simt.build import missing
from ..simt.cases import (
    PAIRS,
    Case,
    assert_right,
    assert_right_forward,
    case,
    differences,
    plan_of,
    run,
    run_forward,
    run_list,
)
from ..simt.process import Worker, worker
from ..simt.protocol import ROWS, RUNS, STRIPS
from ..wide_reference import IS_WIDE, NOT_WIDE

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

VIEWS = {
    "rows": (1, 4, 60),
    "block_rows": (1, 4, 2052),
    "runs": (67, 4, 36),
    "strips": (67, 4, 3),
    "wide_strips": (67, 40, 1),
    "split_runs": (1, 2, 1 << 15),
    "split_strips": (4100, 4, 2),
    "split_columns": (1150, 17, 1),  # more parts than threads that add up those of a column
}
SPLIT = {name: view for name, view in VIEWS.items() if "split" in name}

SIZES = {
    "f32": {"h": 1e30, "t": 1e-30, "l": 1e14, "s": 1e-14},
    "f64": {"h": 1e140, "t": 1e-130, "l": 1e137, "s": 1e-122},
}
"""Of numbers whose squares leave the safe range, far and just so: huge, tiny, large, small. Those
of 1e200 would leave the oracle's, too."""

# The size of each third of the rows, or of the lines where there are several.
EXTREMES = ["hhh", "ttt", "1h1", "h1t", "t1h", "101", "0h0", "t0t", "1l1", "s1s", "sls"]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with worker(tmp_path_factory) as process:
        yield process


def extreme(view: Sequence[int], sizes: str, pair: str = "f32") -> Case:
    """The last row stays as it is."""
    c = case(view, PAIRS[pair])
    of = SIZES[pair] | {"1": 1.0, "0": 0.0}
    for part, size in zip(c.v[:, :-1].tensor_split(3, 0 if view[0] > 1 else 2), sizes, strict=True):
        part.mul_(of[size])
    return c


def norms(c: Case) -> torch.Tensor:
    return reference.norm(c.v, 1).flatten()


def test_views_are_of_every_kind(kernels):
    plans = {name: plan_of(kernels, case(view)) for name, view in VIEWS.items()}
    assert {name for name, p in plans.items() if p.parts > 1} == set(SPLIT)
    assert [p.kind for p in plans.values()] == [
        ROWS, ROWS, RUNS, STRIPS, STRIPS, RUNS, STRIPS, STRIPS,
    ]  # fmt: skip
    assert [p.log_x >= 5 for p in plans.values()][:2] == [False, True]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(
    ("sizes", "pair"),
    [(sizes, "f32") for sizes in EXTREMES]
    + [(sizes, "f64") for sizes in ("hhh", "t0t", "h1t", "sls")],
)
def test_extreme_parts_of_rows(kernels, sizes, pair, view):
    """Blocks that share a row choose their units apart, and have to agree on one."""
    c = extreme(VIEWS[view], sizes, pair)
    assert_right(c, run(kernels, c))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(
    ("sizes", "pair"), [("hhh", "f32"), ("ttt", "f32"), ("h1t", "f32"), ("h1t", "f64")]
)
def test_extreme_rows_that_are_as_long_as_g(kernels, sizes, pair, view):
    """g = norm, as after initialisation: w = v, down to the smallest elements, and gradients of
    their size."""
    c = extreme(VIEWS[view], sizes, pair)
    c = c._replace(g=norms(c).to(c.v.dtype))
    assert_right(c, run(kernels, c))
    c.grad_w.mul_(SIZES[pair][sizes[0]] ** 0.5)
    assert_right(c, run(kernels, c))


@pytest.mark.parametrize("view", ["rows", "runs", "strips", "split_strips"])
@pytest.mark.parametrize(
    ("size", "g"),
    [
        (1e14, 1e30),
        (1e14, 1e-30),
        (1e-14, 1e-30),
        (1e-14, 1e18),
        (1e16, 1e38),
        (1.0, 1e-38),
        (1e-14, 1e30),
        (1e-42, 1e-5),
    ],
)
def test_g_of_another_size(kernels, size, g, view):
    """w is of the size of g, even where g / norm has no float32 of full precision."""
    c = case(VIEWS[view])
    c.v.mul_(size)
    c.g.copy_(torch.full_like(c.g, g))
    assert_right_forward(c, run(kernels, c))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(
    ("bad", "sizes"), [(math.inf, "111"), (-math.inf, "hhh"), (math.nan, "t1h")]
)
def test_a_bad_element_spoils_its_own_row_and_no_other(kernels, bad, sizes, view):
    c = extreme(VIEWS[view], sizes)
    clean = run(kernels, c)
    c.v[-1, 0, -1] = bad
    got = run(kernels, c)
    assert_right_forward(c, got)
    assert not got.grad_g[0].isfinite()
    got.w[:, 0], got.grad_v[:, 0], got.norm[0], got.grad_g[0] = 0, 0, 0, 0
    clean.w[:, 0], clean.grad_v[:, 0], clean.norm[0], clean.grad_g[0] = 0, 0, 0, 0
    assert not differences(got, clean)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("bad", [math.inf, math.nan, 0.0])
def test_a_bad_g_spoils_its_own_row_and_no_other(kernels, bad, view):
    c = case(VIEWS[view])
    c.g[1] = bad
    got = run(kernels, c)
    assert_right_forward(c, got)
    assert got.norm.isfinite().all()
    assert got.w[:, 0].isfinite().all()


@pytest.mark.parametrize("view", VIEWS)
def test_zero_rows_are_nan_as_in_torch(kernels, view):
    c = case(VIEWS[view])
    c.v[:, 0] = 0
    got = run(kernels, c)
    assert got.norm[0] == 0
    assert got.w[:, 0].isnan().all()
    assert_right_forward(c, got)


@pytest.mark.parametrize("pair", ["bf16", "f32", "f64"])
@pytest.mark.parametrize("view", VIEWS)
def test_eps_is_a_lower_bound(kernels, view, pair):
    c = case(VIEWS[view], PAIRS[pair])
    c.v[:, 1:] *= 0.25  # some rows below, some above
    n = norms(c)
    for eps in (float(n.min()) / 2, float(n.min()) * 2, float(n.max()) * 2):
        assert_right(c._replace(eps=eps), run(kernels, c._replace(eps=eps)))
    c.v[:, 0] = 0
    zero = c._replace(eps=0.5)
    got = run(kernels, zero)
    assert_right(zero, got)
    assert got.w[:, 0].eq(0).all()


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("pair", SIZES)
@pytest.mark.parametrize("size", "htls")
def test_eps_of_extreme_rows(kernels, size, pair, view):
    """eps is compared with norms, not with what they are multiplied to."""
    c = extreme(VIEWS[view], size * 3, pair)
    n = norms(c)
    for eps in (float(n.min()) / 2, float(n.min()) * 2):
        clamped = c._replace(g=n.to(c.v.dtype), eps=eps)
        assert_right(clamped, run(kernels, clamped))


@pytest.mark.parametrize(
    ("size", "eps"), [(1e36, 0.0), (1e-40, 0.0), (1e-20, 1e12), (1e-42, 2.0**-130)]
)
@pytest.mark.parametrize("view", VIEWS)
def test_ends_of_the_float_range(kernels, view, size, eps):
    """Norms of almost 8.5e37, whose reciprocal is still normal, subnormal ones, a bound that is too
    large to be scaled, and a subnormal one."""
    c = case(VIEWS[view], eps=eps)
    n = norms(c)
    c.v.mul_(30 * size / n.max() if size > 1 else size)
    g = torch.ones_like(c.g) if eps else norms(c).float()
    c = c._replace(g=g)
    # The backward divides by norms as they are stored: subnormal ones have lost their digits.
    (assert_right_forward if size <= 1e-40 else assert_right)(c, run(kernels, c))


@pytest.mark.skipif(not IS_WIDE, reason=NOT_WIDE)
@pytest.mark.parametrize("pair", SIZES)
@pytest.mark.parametrize("view", ["rows", "runs", "strips", "split_runs", "split_strips"])
def test_results_that_fit(kernels, view, pair):
    cases = [end_of_range(view, end, pair) for end in ENDS if ENDS[end][0] == PAIRS[pair].v]
    for c, got in zip(cases, run_list(kernels, cases).results, strict=True):
        want = wide_reference.weight_norm(c.v, c.g.view(1, -1, 1), c.grad_w, 1, c.eps)
        want.assert_close(got.w, got.grad_v, got.grad_g)


def end_of_range(view: str, end: str, pair: str) -> Case:
    _, *sizes, eps = ENDS[end]
    c = case(VIEWS[view], PAIRS[pair], eps=eps)
    for t, size in zip((c.v, c.g, c.grad_w), sizes, strict=True):
        t.mul_(size)
    return c


@pytest.mark.parametrize("view", [(1, 4, 64), (64, 4, 36), (64, 4, 4)], ids=str)
def test_a_norm_that_is_eps_still_counts(kernels, view):
    """Gradients lack the projection below eps only."""
    c = case(view)
    c.v.sign_()
    c = c._replace(eps=math.sqrt(view[0] * view[2]))
    assert run(kernels, c).norm.eq(c.eps).all()
    assert_right(c, run(kernels, c))


@pytest.mark.parametrize("view", VIEWS)
def test_norms_beyond_the_float_range_are_inf_and_w_is_right(kernels, view):
    c = case(VIEWS[view])
    c.v.copy_(torch.where(c.v > 0, 3e38, -3e38))
    got = run(kernels, c)
    assert got.norm.isinf().all()
    reference.assert_close("w", got.w, reference.forward(c.v, c.g.view(1, -1, 1), 1))


@pytest.mark.parametrize(
    ("view", "dtype"),
    [(v, t) for v in VIEWS for t in (DTYPES[:1] if v in SPLIT else DTYPES)],
    ids=str,
)
def test_only_one_gradient_wanted(kernels, view, dtype):
    """Leaving out a gradient changes no bit of the other."""
    cases = [case(VIEWS[view], PAIRS["f32"], g_dtype=dtype) for _ in range(2)]
    both = run_list(kernels, cases).results
    only_v, only_g = run_list(
        kernels, [cases[0]._replace(want_g=False), cases[1]._replace(want_v=False)]
    ).results
    assert only_v.grad_g is only_g.grad_v is None
    assert differences(only_v, both[0]) == ["grad_g"]
    assert differences(only_g, both[1]) == ["grad_v"]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("pair", ["f32", "f64"])
def test_norms_as_g_give_v(kernels, pair, view):
    c = case(VIEWS[view], PAIRS[pair])
    c = c._replace(g=run(kernels, c).norm)
    (again,) = run_forward(kernels, [c]).results
    assert torch.equal(again.w, c.v)


@pytest.mark.parametrize("g_dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("inner", [60, 2052, 14_000, 1 << 15])
def test_one_norm_of_halves_divides_as_g_holds_it(kernels, inner, g_dtype):
    """So w = v, if g is the norm that the kernel computed; of several draws, one would not."""
    cases = [case((1, 1, inner), PAIRS["bf16"], g_dtype=g_dtype) for _ in range(6)]
    results = run_list(kernels, cases).results
    as_g = [c._replace(g=r.norm.to(g_dtype)) for c, r in zip(cases, results, strict=True)]
    for c, r in zip(as_g, run_forward(kernels, as_g).results, strict=True):
        assert torch.equal(r.w, c.v)


@pytest.mark.parametrize("size", [1e-6, 1e5])
def test_one_norm_that_float16_cannot_hold(kernels, size):
    """w divides by the norm as it is."""
    c = case((1, 1, 60), PAIRS["bf16"], g_dtype=torch.float16)
    c.v.mul_(size)
    assert_right(c, run(kernels, c))


@pytest.mark.parametrize("side", ["below", "above"])
@pytest.mark.parametrize("view", [(1, 1, 60), (1, 1, 4100)], ids=str)
def test_a_bound_between_one_norm_and_what_it_is_rounded_to(kernels, view, side):
    """The bits are those of a formula that rounds first and bounds then."""
    c = case(view, PAIRS["bf16"])
    v, eps = rounded_past_eps(view, torch.bfloat16, side)
    c = c._replace(v=v, eps=eps)
    n = v.double().norm().bfloat16().float().clamp_min(eps)
    assert torch.equal(run(kernels, c).w, (v.float() * (c.g.float() / n)).bfloat16())
