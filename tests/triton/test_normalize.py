"""normalize_ on the Triton backend: every way of cutting rows, lists, versions, tables."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import wnkernel
from wnkernel import normalize_
from wnkernel.backends.triton import arrays, tables
from wnkernel.backends.triton.plan import Kind
from wnkernel.problem import check

from ..cases import DTYPES, randn, randn_g
from ..normalize.expected import assert_normal, assert_normalizes, assert_norms
from ..reference import bits
from .cases import (
    DEVICE,
    TRITON,
    Case,
    fresh,
    needs_triton,
    plan_of,
    record_launches,
    rows_case,
    split_early,
)

pytestmark = needs_triton

F16, BF16, F32, F64 = DTYPES

VIEWS = {
    "rows": (1, 40, 128),
    "a few rows": (1, 3, 5),
    "whole": (1, 1, 2048),
    "long rows": (1, 2, 3001),
    "runs": (34, 2, 40),
    "strips": (140, 3, 5),
    "columns": (30, 70, 1),
}
"""Rows in memory, [outer, rows, inner]."""
SPLIT = ["long rows", "runs", "strips"]
"""Those that are split with split_early()."""


@pytest.fixture(autouse=True)
def _on_triton(monkeypatch):
    fresh(monkeypatch)
    with wnkernel.use_backend("triton"):
        yield


def rows(c: Case) -> Tensor:
    """A view with the rows first."""
    return c.v[None] if c.dim is None else c.v.movedim(c.dim, 0)


def mixed() -> list[Case]:
    """Of every kind and dtype, with a row of zeros and one whose squares leave the float range."""
    cases = [rows_case(*view) for view in VIEWS.values()]
    cases += [rows_case(*VIEWS["strips"], dtype) for dtype in (F16, F64)]
    cases += [rows_case(3, 4, 0), rows_case(1, 5, 7, BF16, g_dtype=F32)]
    for c in cases:
        if c.dim is not None and c.v.numel():
            rows(c)[1] = 0
            if c.v.dtype == F32:
                rows(c)[0] *= 1e30
    return cases


def run(cases: list[Case], **options: object) -> tuple[list[Tensor], list[Tensor]]:
    """What is written over copies, and the norms that were there."""
    xs, dims = [c.v.clone() for c in cases], [c.dim for c in cases]
    return xs, normalize_(xs, dims, return_norms=True, **options)


def assert_same_bits(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(bits(a), bits(b))


@pytest.mark.parametrize(
    ("view", "is_split"), [*((view, False) for view in VIEWS), *((view, True) for view in SPLIT)]
)
def test_every_kind_of_rows(monkeypatch: pytest.MonkeyPatch, view: str, is_split: bool) -> None:
    """Values, norms, the version; of zeros, too, and where squares leave the float range."""
    if is_split:
        split_early(monkeypatch)
    c = rows_case(*VIEWS[view])
    assert (plan_of(c)[0].split > 1) == is_split
    assert_normalizes(c.v, c.dim, c.g)
    if c.dim is not None:
        rows(c)[1] = 0
        rows(c)[0] *= 1e-30
        assert_normalizes(c.v, c.dim, 2.0)
        assert rows(c)[1].eq(0).all()


def test_the_views_are_of_every_kind() -> None:
    plans = {name: plan_of(rows_case(*view)) for name, view in VIEWS.items()}
    assert {tile.kind for _, tile in plans.values()} == set(Kind)
    assert {plans[name][1].kind for name in SPLIT} == {Kind.RUNS, Kind.STRIPS}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    """Of the tensor, and of the norm of each row."""
    for dim, norm_dtype in ((0, F16), (1, F64), (None, F32)):
        r = randn_g((6, 5, 4), dim, norm_dtype).to(DEVICE)
        assert_normalizes(randn((6, 5, 4), dtype).to(DEVICE), dim, r)


def test_eps() -> None:
    c = rows_case(1, 40, 20)
    c.v.mul_(torch.logspace(-2, 1, 40, device=DEVICE)[:, None])
    rows(c)[3] = 0
    for eps in (1e-12, 2.0, 1e-42):
        assert_normalizes(c.v.clone(), c.dim, 3.0, eps)


def test_nan_and_inf_spoil_no_other_row() -> None:
    for view in ("rows", "strips"):
        c = rows_case(*VIEWS[view])
        rows(c)[0, ..., :1] = float("nan")
        rows(c)[1, ..., :1] = float("inf")
        assert_normalizes(c.v, c.dim)
        assert rows(c)[2].isfinite().all()


def test_other_memory_orders() -> None:
    for layout in ("transposed", "unaligned", "gaps"):
        assert_normalizes(randn((8, 16), F32, layout).to(DEVICE), 1, 2.0)


def test_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values; the bits of each alone, and of w of a weight norm with the same norms and a bound."""
    split_early(monkeypatch)
    cases = mixed()
    together, norms = run(cases, norm=[c.g for c in cases], eps=1e-6)
    ws, _ = TRITON.weights([check(c.v, c.g, c.dim, 1e-6) for c in cases])
    assert_same_bits(together, ws)
    for c, x, n in zip(cases, together, norms, strict=True):
        assert_normal(x, c.v, c.dim, c.g, 1e-6)
        assert_norms(n, c.v, c.dim)
        (alone,), (norm,) = run([c], norm=c.g, eps=1e-6)
        assert_same_bits([x, n], [alone, norm])


def test_rows_of_zeros_in_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an eps."""
    split_early(monkeypatch)
    cases = mixed()
    for c, x in zip(cases, run(cases, norm="sqrt_numel")[0], strict=True):
        if c.dim is not None and c.v.numel():
            assert x.movedim(c.dim, 0)[1].eq(0).all()
        assert x.isfinite().all()


def test_versions_go_up_by_one() -> None:
    """Once for each tensor, whatever it is computed in."""
    xs = [randn((4, 3)), randn((8, 6), F16, "gaps"), randn((0, 3)), randn((3, 2), F64)]
    xs = [x.to(DEVICE) for x in xs]
    versions = [x._version for x in xs]
    normalize_(xs)
    assert [x._version for x in xs] == [version + 1 for version in versions]
    a = torch.ones(4, 3, device=DEVICE, requires_grad=True)
    y = (a * xs[0]).sum()
    normalize_(xs)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    with torch.inference_mode():
        x = torch.ones(4, 3, device=DEVICE)
        normalize_(x)
    assert_normal(x.clone(), torch.ones(4, 3, device=DEVICE))


def test_one_launch_for_each_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = record_launches(monkeypatch)
    xs = [randn((2 + k, 5), (F32, BF16)[k % 2]).to(DEVICE) for k in range(8)]
    normalize_(xs, norm=2.0)
    assert [launch.kernel for launch in launches] == ["forward_list"] * 2
    launches.clear()
    normalize_(xs[0])
    assert [launch.kernel for launch in launches] == ["forward_one"]
    launches.clear()
    normalize_([torch.empty(0, 3, device=DEVICE)])
    assert launches == []


def test_a_second_call_takes_no_new_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another number does: it is a constant at another address. The norms are where they were, as
    where a GPU's allocator gives memory back in order."""
    built, memory = [], {}
    at, make = tables.Table.at, arrays.Results.make

    def counted(table: tables.Table, addresses: object) -> Tensor:
        built.append(table)
        return at(table, addresses)

    def made_once(results: arrays.Results, *args: object) -> list[Tensor]:
        if results not in memory:
            memory[results] = make(results, *args)
        return memory[results]

    monkeypatch.setattr(tables.Table, "at", counted)
    monkeypatch.setattr(arrays.Results, "make", made_once)
    xs = [randn((4 + k, 9)).to(DEVICE) for k in range(5)]
    for k in range(4):
        xs[k].mul_(3.0)
        normalize_(xs, norm=2.0)
        assert len(built) == 1
    normalize_(xs, norm=3.0)
    assert len(built) == 2
    for x in xs:
        torch.testing.assert_close(x.norm(dim=1), torch.full((len(x),), 3.0, device=DEVICE))


def test_one_norm_of_halves_is_not_rounded_on_triton() -> None:
    x = randn((64, 64), torch.bfloat16)
    y = x.clone()
    with wnkernel.use_backend("triton"):
        normalize_(x, None, norm=torch.tensor(64.0, dtype=torch.bfloat16))
        normalize_(y, None, norm=64.0)
    assert torch.equal(x, y)
