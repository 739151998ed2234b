"""Weights for every tile of the Triton backend, and what the backend makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from wnkernel.backends import BACKENDS
from wnkernel.backends.triton import availability
from wnkernel.backends.triton import plan as plans
from wnkernel.backends.triton.plan import VECTOR_BYTES, Kind, Plan, Tile, plan, tiles
from wnkernel.problem import accumulation_dtype, check, row_view

from .. import reference
from ..cases import randn, randn_g

TRITON = BACKENDS["triton"]
WHY_NOT = "; ".join(TRITON.missing())
OLDEST_TRITON = ".".join(map(str, availability.OLDEST))
"""For modules that import Triton themselves."""

needs_triton = pytest.mark.skipif(bool(WHY_NOT), reason=f"triton: {WHY_NOT}")


def _device() -> torch.device:
    if WHY_NOT:
        return torch.device("cpu")
    return torch.empty(0, device="cpu" if availability.is_interpreted() else "cuda").device


DEVICE = _device()
"""Where the kernels run: the CPU for Triton's interpreter."""


class Case(NamedTuple):
    """A weight, the gradient of its result, and how it is normed."""

    v: Tensor
    g: Tensor
    grad_w: Tensor
    dim: int | None = 0
    eps: float = 0.0
    out_dtype: torch.dtype | None = None


class Result(NamedTuple):
    """What a forward and a backward give."""

    w: Tensor
    norm: Tensor
    grad_v: Tensor | None
    grad_g: Tensor | None


def case(
    shape: Sequence[int],
    dim: int | None,
    dtype: torch.dtype = torch.float32,
    *,
    g_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    eps: float = 0.0,
    shifted: bool = False,
) -> Case:
    """Random numbers. ``shifted``: v and grad_w begin one element after an aligned address."""
    v, grad_w = randn(shape, dtype), randn(shape, out_dtype or dtype)
    g = randn_g(shape, dim, g_dtype or dtype).to(DEVICE)
    place = shift if shifted else _same
    return Case(place(v.to(DEVICE)), g, place(grad_w.to(DEVICE)), dim, eps, out_dtype)


def rows_case(
    outer: int, rows: int, inner: int, dtype: torch.dtype = torch.float32, **options: object
) -> Case:
    """A weight whose view is ``[outer, rows, inner]``; a single row has ``outer`` 1."""
    return case((outer, rows, inner), None if rows == 1 else 1, dtype, **options)


def shift(t: Tensor) -> Tensor:
    """t in memory of its own, one element after an aligned address."""
    return t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)


def _same(t: Tensor) -> Tensor:
    return t


def run(
    cases: Iterable[Case],
    need_v: Sequence[bool] | None = None,
    need_g: Sequence[bool] | None = None,
) -> list[Result]:
    """A forward and a backward of a list, by the backend alone."""
    cases = list(cases)
    problems = [check(c.v, c.g, c.dim, c.eps, c.out_dtype) for c in cases]
    yes = [True] * len(cases)
    ws, norms = TRITON.weights(problems)
    grads = TRITON.gradients(
        problems, norms, [c.grad_w for c in cases], need_v or yes, need_g or yes
    )
    return [Result(*each) for each in zip(ws, norms, *grads, strict=True)]


def plan_of(c: Case) -> tuple[Plan, Tile]:
    """How a dense weight is cut, where all arrays are as aligned as v."""
    view = row_view(c.v, check(c.v, c.g, c.dim).dim)
    itemsize = c.v.element_size()
    vector = 1 if c.v.data_ptr() % VECTOR_BYTES else VECTOR_BYTES // itemsize
    cut = plan(view.outer, view.rows, view.inner, itemsize, vector)
    return cut, tiles(itemsize)[cut.tile]


def assert_right(c: Case, r: Result) -> None:
    """Everything against the oracle."""
    assert_right_forward(c, r)
    want_v, want_g = reference.backward(c.v, c.g, c.grad_w, c.dim, c.eps)
    assert (r.grad_v.dtype, r.grad_g.dtype) == (c.v.dtype, c.g.dtype)
    reference.assert_close("grad_v", r.grad_v, want_v)
    reference.assert_close("grad_g", r.grad_g, want_g)


def assert_right_forward(c: Case, r: Result) -> None:
    """w and the norms."""
    want = reference.forward(c.v, c.g, c.dim, c.eps)
    assert r.w.dtype == (c.out_dtype or c.v.dtype)
    reference.assert_close("w", r.w, want)
    norm = reference.norm(c.v, c.dim)
    assert r.norm.dtype == accumulation_dtype(c.v.dtype)
    reference.assert_close("norm", r.norm, replace(want, value=norm, scale=norm))


def assert_same_bits(a: Result, b: Result) -> None:
    """NaN is NaN, whatever its bits; 0 is not -0."""
    for name, x, y in zip(Result._fields, a, b, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(reference.bits(x), reference.bits(y)), name


def view_for(tile: Tile, dtype: torch.dtype) -> tuple[int, int, int]:
    """A small ``[outer, rows, inner]`` that takes a tile, two of it or three, the last partly
    empty."""
    vector = VECTOR_BYTES // dtype.itemsize if tile.aligned else 1
    match tile.kind:
        case Kind.ROWS:
            return 1, tile.lines + 1, tile.columns - vector
        case Kind.RUNS if tile.lines == 1:
            return 1, 2, _longest_row(tile.aligned, dtype) + vector
        case Kind.RUNS:
            return tile.lines + 1, 2, 40 if tile.aligned else 33
        case Kind.STRIPS:
            return tile.lines + 1, tile.columns // 8 + 1, 8 if tile.aligned else 7
    raise AssertionError(tile)


def _longest_row(aligned: bool, dtype: torch.dtype) -> int:
    """Elements of the longest row that one tile holds."""
    return max(
        t.columns for t in tiles(dtype.itemsize) if t.kind is Kind.ROWS and t.aligned is aligned
    )


def every_tile(dtypes: Iterable[torch.dtype]) -> list:
    """``(dtype, tile)`` parameters."""
    return [
        pytest.param(dtype, tile, id="-".join([str(dtype), _name(tile)]))
        for dtype in dtypes
        for tile in tiles(dtype.itemsize)
    ]


def _name(tile: Tile) -> str:
    return f"{tile.kind.name}{tile.lines}x{tile.columns}{'a' if tile.aligned else ''}"


def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plans, variants, tables (addresses may come again) and answers of other tests."""
    plan.cache_clear()
    monkeypatch.setattr(TRITON, "_used", set())
    if not WHY_NOT:
        from wnkernel.backends.triton import variants
        from wnkernel.backends.triton.launch import Launcher

        variants.of_one.cache_clear()
        variants.of_list.cache_clear()
        monkeypatch.setitem(vars(TRITON), "_launcher", Launcher())


def split_early(monkeypatch: pytest.MonkeyPatch, fill: int = 4) -> None:
    """Rows and strips of two tiles and more are split, into ``fill`` programs all together."""
    for name, value in (("SPLIT_TILES", 1), ("FILL", fill)):
        monkeypatch.setattr(plans, name, value)
    fresh(monkeypatch)


class Launch(NamedTuple):
    """One launch."""

    kernel: str
    programs: int
    finish: int


def record_launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """A list that grows with every launch."""
    from wnkernel.backends.triton.variants import Variant

    launches = []
    original: Callable[..., None] = Variant.launch

    def launch(variant, programs, args):
        launches.append(Launch(variant.kernel.__name__, programs, variant.choices["FINISH"]))
        original(variant, programs, args)

    monkeypatch.setattr(Variant, "launch", launch)
    return launches
