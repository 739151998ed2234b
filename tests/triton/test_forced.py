"""Norms that are forced to a value before w is computed, and a negative eps, which is added to
norms (EDM2, Karras et al. 2024), on the Triton backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from wnkernel.backends.triton.plan import Kind
from wnkernel.problem import Problem, accumulation_dtype, canonical_dim

from .. import reference
from ..cases import DTYPES
from ..reference import Expected
from .cases import (
    TRITON,
    Case,
    case,
    fresh,
    needs_triton,
    plan_of,
    record_launches,
    rows_case,
    split_early,
)
from .test_steps import Still

pytestmark = needs_triton

F16, BF16, F32, F64 = DTYPES

VIEWS = {
    "rows": ((1, 5, 60), Kind.ROWS, 1),
    "rows that are not aligned": ((1, 5, 33), Kind.ROWS, 1),
    "runs": ((34, 2, 40), Kind.RUNS, 1),
    "strips": ((140, 3, 5), Kind.STRIPS, 1),
    "split runs": ((1, 2, 3001), Kind.RUNS, 4),
    "split strips": ((140, 3, 5), Kind.STRIPS, 4),
}
"""A view, its tiles, and into how many programs rows are split."""


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh(monkeypatch)


def view_case(monkeypatch, name: str, dtype: torch.dtype = F32, **options: object) -> Case:
    view, kind, fill = VIEWS[name]
    split_early(monkeypatch, fill)
    c = rows_case(*view, dtype, **options)
    cut, tile = plan_of(c)
    assert (tile.kind, cut.split > 1) == (kind, fill > 1)
    return c


class Results(NamedTuple):
    v: Tensor
    norm: Tensor
    w: Tensor


def problem(c: Case) -> Problem:
    """Unchecked, as check() refuses a negative eps."""
    return Problem(c.v, c.g, canonical_dim(c.dim, c.v.ndim), c.eps, c.out_dtype or c.v.dtype)


def run(cases: Sequence[Case], forced: Sequence[float], *, apart: bool = False) -> list[Results]:
    problems = [problem(c._replace(v=c.v.clone())) for c in cases]
    ws, norms = TRITON.forced(problems, forced, apart=apart)
    return [Results(p.v, norm, w) for p, norm, w in zip(problems, norms, ws, strict=True)]


def n_of(norm: Tensor, eps: float) -> Tensor:
    return norm - eps if eps < 0 else norm.clamp_min(eps)


def formula(c: Case, forced: float) -> Results:
    """In float64. A row of zeros stays one, and has a w of zeros."""
    v, norm = c.v.double(), reference.norm(c.v, c.dim)
    if forced:
        n = n_of(norm, c.eps)
        v, norm = ((t * (forced / n)).where(n != 0, 0.0) for t in (v, norm))
    n = n_of(norm, c.eps)
    w = (v * (c.g.double() / n)).where((n != 0) | (forced == 0), 0.0)
    return Results(v, norm, w)


def assert_right(c: Case, forced: float, got: Results) -> None:
    acc, count = accumulation_dtype(c.v.dtype), reference.length(c.v, c.dim)
    assert [t.dtype for t in got] == [c.v.dtype, acc, c.out_dtype or c.v.dtype]
    for name, a, b in zip(Results._fields, got, formula(c, forced), strict=True):
        reference.assert_close(name, a, Expected(b, b.abs(), count, acc))


def assert_equal(got: Sequence[Results], want: Sequence[Results]) -> None:
    for a, b in zip(got, want, strict=True):
        assert list(map(torch.equal, a, b)) == [True] * 3


@pytest.mark.parametrize("eps", [-0.7, 0.0, 1e-3, 1e3])
@pytest.mark.parametrize("name", VIEWS)
def test_alone_and_in_a_list(monkeypatch, name, eps):
    c = view_case(monkeypatch, name, eps=eps)
    other = rows_case(*VIEWS[name][0], eps=eps)
    launches = record_launches(monkeypatch)
    (alone,) = run([c], [3.5])
    assert_right(c, 3.5, alone)
    count = len(launches)
    (w,), (norm,) = TRITON.weights([problem(other)])
    unforced = Results(other.v, norm, w)
    assert_right(other, 0, unforced)
    launches.clear()
    assert_equal(run([other, c], [0, 3.5]), [unforced, alone])
    assert len(launches) == count == (2 if "split" in name else 1)
    assert_equal(run([c, other], [3.5, 0], apart=True), [alone, unforced])


@pytest.mark.parametrize("name", ["rows", "runs", "split strips"])
@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [(F16, None), (BF16, None), (F64, None), (BF16, F32), (F16, F64), (F32, BF16), (F64, F16)],
    ids=str,
)
def test_dtypes(monkeypatch, name, dtype, out_dtype):
    """The new v is rounded once, and so is w, which knows nothing of a rounded v."""
    c = view_case(monkeypatch, name, dtype, g_dtype=F32, out_dtype=out_dtype, eps=-0.7)
    (got,) = run([c], [0.75])
    assert_right(c, 0.75, got)


def test_one_norm_of_halves():
    """It is rounded to the dtype of g where w is computed, and only there."""
    c = case((4, 33), None, BF16)
    c.g.fill_(1000.25)  # 1000 in bfloat16
    (got,) = run([c], [1000.25])
    assert_right(c, 1000.25, got)
    assert torch.equal(got.w, got.v)


@pytest.mark.parametrize("eps", [-1e-4, 0.0, 1e-4])
@pytest.mark.parametrize("name", ["rows", "strips", "split runs", "split strips"])
def test_zero_and_extreme_rows(monkeypatch, name, eps):
    c = view_case(monkeypatch, name, eps=eps)
    c.v[:, 0] = 0
    cases = [c._replace(v=c.v * size) for size in (1e30, 1e-30, 4e37, 1e-40)]
    for extreme, got in zip(cases, run(cases, [2.0] * 4), strict=True):
        assert_right(extreme, 2.0, got)
        assert not any(t[:, 0].any() for t in got)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("eps", [-0.7, 0.0, 1e3])
@pytest.mark.parametrize("name", ["rows", "strips"])
def test_bad_rows(monkeypatch, name, eps, bad):
    """They spoil no other."""
    c = view_case(monkeypatch, name, eps=eps)
    (clean,) = run([c], [2.0])
    c.v[-1, 0, 3] = bad
    (got,) = run([c], [2.0])
    assert_right(c, 2.0, got)
    assert_equal([Results(*(t[:, 1:] for t in got))], [Results(*(t[:, 1:] for t in clean))])


def grads(c: Case, *, apart: bool = False) -> list[Tensor]:
    p = [problem(c)]
    norms = TRITON.weights(p, apart=apart)[1]
    return [t for (t,) in TRITON.gradients(p, norms, [c.grad_w], [True], [True])]


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, F32) for name in VIEWS), ("rows", F64), ("strips", BF16)], ids=str
)
def test_derivatives_of_norms_with_an_added_eps(monkeypatch, name, dtype):
    c = view_case(monkeypatch, name, dtype, eps=-0.7)
    c.v[:, 0] = 0
    v, g, grad_w = (t.double() for t in (c.v, c.g, c.grad_w))
    norm = torch.linalg.vector_norm(v.requires_grad_(), 2, [0, 2], keepdim=True)
    n = norm + 0.7
    want_v, want_g = torch.autograd.grad(g.requires_grad_() * v / n, [v, g], grad_w)
    terms = (grad_w * v / n).abs().sum([0, 2], keepdim=True)
    scale_v = g.abs() / n * (grad_w.abs() + v.abs() / norm.clamp_min(1e-9) * terms)
    size = reference.length(c.v, c.dim), accumulation_dtype(dtype)
    got = grads(c)
    reference.assert_close("grad_v", got[0], Expected(want_v, scale_v.detach(), *size))
    reference.assert_close("grad_g", got[1], Expected(want_g, terms.detach(), *size))
    two = [problem(case((1, 5, 3), 1, dtype)), problem(c)]
    norms, grad_ws = TRITON.weights(two)[1], [two[0].v, c.grad_w]
    listed = TRITON.gradients(two, norms, grad_ws, [True] * 2, [True] * 2)
    for alone, apart, (_, in_list) in zip(got, grads(c, apart=True), listed, strict=True):
        assert torch.equal(alone, in_list)
        assert torch.equal(alone, apart)


def test_derivatives_of_rows_that_are_tiny_beside_an_added_eps():
    """n / norm leaves the range of floats, where n does not."""
    c = rows_case(1, 3, 60, eps=-1e-4)
    c.v.mul_(1e-44)
    grad_v, grad_g = grads(c)
    want = c.grad_w.double() * c.g.double() / 1e-4
    reference.assert_close("grad_v", grad_v, Expected(want, want.abs(), 60, F32))
    assert grad_g.abs().max() < 1e-38


def test_a_backward_takes_the_norms_of_the_new_v():
    c = rows_case(1, 5, 60, eps=-1e-4)
    p = problem(c)
    norms = TRITON.forced([p], [2.0])[1]
    got = TRITON.gradients([p], norms, [c.grad_w], [True], [True])
    for (a,), b in zip(got, grads(c), strict=True):
        torch.testing.assert_close(a, b)


def test_writes_are_counted():
    """For autograd, where something was written."""
    cases = [case((3, 5), 0) for _ in range(3)]
    problems = [problem(c) for c in cases]
    with torch.inference_mode():
        problems.append(problem(case((3, 5), 0)))
    versions = [c.v._version for c in cases]
    TRITON.forced(problems, [2.0, 0.0, 1.5, 1.0])
    assert [c.v._version for c in cases] == [versions[0] + 1, versions[1], versions[2] + 1]
    torch.testing.assert_close(problems[3].v.norm(dim=1), torch.ones(3))
    assert TRITON.forced([], []) == ([], [])


def test_the_same_call_uploads_no_new_table(monkeypatch):
    still = Still(monkeypatch)
    problems = [problem(case((6, 4), 0, eps=-1e-4)), problem(case((4, 9), 0))]
    for forced, made in (([2, 0], 1), ([2, 0], 1), ([2, 3], 2), ([2, 0], 2), ([0, 0], 3)):
        still._next = 0
        TRITON.forced(problems, forced)
        assert still.made == made


@pytest.mark.parametrize("count", [1, 2])
def test_values_of_the_same_shapes_are_not_mixed_up(count):
    """Neither forced norms nor eps of another sign."""
    cases = [case((6, 4), 0) for _ in range(count)]
    for forced, eps in 2 * [(2.0, 0.5), (3.0, 0.5), (0.0, 0.5), (2.0, -0.5), (0.0, -0.5)]:
        each = [c._replace(eps=eps) for c in cases]
        values = [0.0, forced][-count:]
        for c, r, got in zip(each, values, run(each, values), strict=True):
            assert_right(c, r, got)
