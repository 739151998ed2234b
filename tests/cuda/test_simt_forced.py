"""The CUDA kernels where w is v, where norms are forced, and where eps is added to norms; see
tests/cuda/test_simt.py."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from .. import reference
from ..simt.build import missing
from ..simt.cases import (
    ASCENDING,
    DESCENDING,
    LOCKSTEP,
    ORDERS,
    PAIRS,
    Case,
    Result,
    case,
    differences,
    run,
    run_forward,
    run_list,
)
from ..simt.formulas import assert_right_added, assert_right_forced
from ..simt.process import Worker, worker
from .test_simt_values import EXTREMES, SPLIT, VIEWS, extreme, norms

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

SAME = [name for name, types in PAIRS.items() if types.v == types.w]
"""Pairs whose w fits into v."""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with worker(tmp_path_factory) as process:
        yield process


def forward(kernels: Worker, c: Case, order: int = LOCKSTEP) -> Result:
    (result,) = run_forward(kernels, [c], order=order).results
    return result


def every_kind(pairs: list[str], **fields: object) -> list[Case]:
    """All views, in types that take turns, every third not aligned."""
    types = [PAIRS[pairs[k % len(pairs)]] for k in range(len(VIEWS))]
    kinds = enumerate(zip(VIEWS.values(), types, strict=True))
    return [case(view, of, aligned=k % 3 > 0, **fields) for k, (view, of) in kinds]


# w is v.


@pytest.mark.parametrize("pair", SAME)
@pytest.mark.parametrize("view", VIEWS)
def test_w_in_the_memory_of_v(kernels, view, pair):
    """The bits of a w with memory of its own, in any order of threads."""
    for aligned in (True, False):
        c = case(VIEWS[view], PAIRS[pair], aligned=aligned)
        for order in ORDERS:
            in_place = forward(kernels, c._replace(in_place=True), order)
            assert not differences(forward(kernels, c), in_place)


@pytest.mark.parametrize("sizes", ["h1t", "0h0"])
@pytest.mark.parametrize("view", VIEWS)
def test_extreme_rows_in_the_memory_of_v(kernels, view, sizes):
    """They are read again before they are written."""
    c = extreme(VIEWS[view], sizes)
    in_place = forward(kernels, c._replace(in_place=True), ASCENDING)
    assert not differences(forward(kernels, c), in_place)


@pytest.mark.parametrize("processors", [132, 2])
def test_a_list_in_the_memory_of_v(kernels, processors):
    cases = every_kind(SAME)
    every_second = [c._replace(in_place=k % 2 > 0) for k, c in enumerate(cases)]
    apart, in_place = (
        run_forward(kernels, of, order=DESCENDING, processors=processors).results
        for of in (cases, every_second)
    )
    for a, b in zip(apart, in_place, strict=True):
        assert not differences(a, b)


# Forced norms.


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("view", VIEWS)
def test_forced_norms(kernels, view, pair):
    """With no eps, one between norms, one above all, and one that is added."""
    for aligned in (True, False):
        c = case(VIEWS[view], PAIRS[pair], aligned=aligned)
        c.v[:, 1:] *= 0.25
        of = norms(c)
        for k, eps in enumerate((0.0, float(of.mean()), float(of.max()) * 2, -0.3)):
            forced = c._replace(eps=eps, forced=(1.0, 0.7, 3.0)[k % 3])
            result = forward(kernels, forced)
            assert_right_forced(forced, result)
            assert not differences(result, forward(kernels, forced, ORDERS[1 + k % 2]))


@pytest.mark.parametrize("view", VIEWS)
def test_w_of_a_forced_norm_is_that_of_v(kernels, view):
    """Bit for bit, if nothing is bounded; and v has the norm, to be forced once more."""
    c = case(VIEWS[view])
    plain, forced = forward(kernels, c), forward(kernels, c._replace(forced=0.7))
    assert differences(plain, forced) == ["norm", "v"]
    assert forced.norm.eq(torch.tensor(0.7)).all()
    torch.testing.assert_close(forward(kernels, c._replace(v=forced.v)).norm, forced.norm)


def test_gradients_after_a_forced_norm(kernels):
    """They are those of the v that is left."""
    for view in VIEWS.values():
        c = case(view, forced=1.5)
        (result,) = run_list(kernels, [c]).results
        left = c._replace(v=result.v, forced=0.0)
        want_v, want_g = reference.backward(left.v, c.g.view(1, -1, 1), c.grad_w, 1)
        reference.assert_close("grad_v", result.grad_v, want_v)
        reference.assert_close("grad_g", result.grad_g.view(1, -1, 1), want_g)


@pytest.mark.parametrize("order", ORDERS)
def test_a_list_of_forced_and_other_weights(kernels, order):
    """Each has its bits alone, whatever is in the list and on any card."""
    forced = every_kind(list(PAIRS), forced=1.0, eps=-1e-4)
    others = every_kind([*PAIRS][::-1], eps=0.5)
    cases = [c for pair in zip(forced, others, strict=True) for c in pair]
    for processors in (132, 4):
        listed = run_forward(kernels, cases, order=order, processors=processors).results
        for c, result in zip(cases, listed, strict=True):
            assert not differences(result, forward(kernels, c))
            if c.forced:
                assert_right_forced(c, result)


@pytest.mark.parametrize("pair", ["f32", "f64"])
@pytest.mark.parametrize("view", VIEWS)
def test_extreme_rows_of_a_forced_norm(kernels, view, pair):
    for sizes in EXTREMES if view not in SPLIT else EXTREMES[:4]:
        c = extreme(VIEWS[view], sizes, pair)._replace(forced=1.0)
        of = norms(c)
        for eps in (0.0, float(of.min()) * 2, -1e-4, -float(of.min())):
            assert_right_forced(c._replace(eps=eps), forward(kernels, c._replace(eps=eps)))


@pytest.mark.parametrize(("size", "eps"), [
    (1e-42, 0.0), (1e-42, -1e-4), (1e-42, -1e-42),
    (3e-40, -1e-40), (3e36, 0.0), (3e36, -1e-4), (1e37, 0.0),
])  # fmt: skip
@pytest.mark.parametrize("view", VIEWS)
def test_forced_norms_at_the_ends_of_the_float_range(kernels, view, size, eps):
    """1 / n is no normal number, and v is multiplied by two factors; the last norms overflow."""
    c = case(VIEWS[view], forced=1.0, eps=eps)
    c.v.mul_(size if size < 1 else 30 * size / norms(c).max())
    assert_right_forced(c, forward(kernels, c))


@pytest.mark.parametrize("eps", [0.0, 1e-60, 0.5, -1e-60, -1e-4])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("view", VIEWS)
def test_rows_of_zeros_stay_zeros(kernels, view, pair, eps):
    c = case(VIEWS[view], PAIRS[pair], eps=eps, forced=1.0)
    c.v[:, 1] = 0
    result = forward(kernels, c)
    assert_right_forced(c, result)
    assert result.v[:, 1].eq(0).all()
    assert result.w[:, 1].eq(0).all()
    assert result.norm[1] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("view", VIEWS)
def test_a_bad_element_spoils_its_own_forced_row(kernels, view, bad):
    c = case(VIEWS[view], forced=1.0)
    clean = forward(kernels, c)
    c.v[-1, 0, -1] = bad
    result = forward(kernels, c)
    assert_right_forced(c, result)
    assert result.norm[0].isnan()
    assert result.w[:, 0].isnan().all()
    for of in (clean, result):
        of.v[:, 0], of.w[:, 0], of.norm[0] = 0, 0, 0
    assert not differences(clean, result)


def test_one_forced_norm_of_halves_divides_as_g_holds_it(kernels):
    """So a g that is the forced norm gives the new v."""
    for view in ((1, 1, 60), (1, 1, 14_000), (1, 1, 1 << 15)):
        c = case(view, PAIRS["bf16"], forced=0.3)
        c.g.fill_(c.forced)
        result = forward(kernels, c)
        assert result.w.eq(result.v).double().mean() > 0.99  # others are rounded twice
        want = c.v.double() * c.forced / reference.norm(c.v, 1)
        torch.testing.assert_close(result.w.double(), want, rtol=2**-8, atol=0)


# eps is added.


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("view", VIEWS)
def test_eps_is_added(kernels, view, pair):
    for aligned in (True, False):
        c = case(VIEWS[view], PAIRS[pair], aligned=aligned)
        c.v[:, 0] = 0
        for k, eps in enumerate((-1e-4, -float(norms(c).max()))):
            added = c._replace(eps=eps)
            result = run(kernels, added)
            assert_right_added(added, result)
            assert result.w[:, 0].eq(0).all()
            assert not differences(result, run(kernels, added, ORDERS[1 + k]))


@pytest.mark.parametrize("pair", ["f32", "f64"])
@pytest.mark.parametrize("view", VIEWS)
def test_eps_is_added_to_extreme_norms(kernels, view, pair):
    for sizes in ("hhh", "ttt", "h1t", "sls"):
        c = extreme(VIEWS[view], sizes, pair)
        of = norms(c)
        for eps in (-1e-4, -float(of.min()), -float(of.max())):
            c = c._replace(g=of.to(c.v.dtype), eps=eps)
            assert_right_added(c, run(kernels, c))


@pytest.mark.parametrize(("size", "eps"), [(3e-40, -(2.0**-130)), (1e-20, -1e12), (1e-42, -1e-4)])
@pytest.mark.parametrize("view", VIEWS)
def test_an_added_eps_at_the_ends_of_the_float_range(kernels, view, size, eps):
    c = case(VIEWS[view], eps=eps)
    c.v.mul_(size)
    c.v[:, 1] = 0
    c.g.fill_(max(abs(eps), size))
    assert_right_added(c, run(kernels, c))


@pytest.mark.parametrize("pair", PAIRS)
def test_a_list_with_an_added_eps(kernels, pair):
    cases = [case(v, PAIRS[pair], eps=(-0.1, 0.5)[k % 2]) for k, v in enumerate(VIEWS.values())]
    for c, listed in zip(cases, run_list(kernels, cases, DESCENDING).results, strict=True):
        assert not differences(listed, run(kernels, c))
        if c.eps < 0:
            assert_right_added(c, listed)
