"""Any weight alone, forward and backward, on every backend that runs here."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import wnkernel
from wnkernel import functional as F
from wnkernel.backends import BACKENDS

from .. import wide_reference
from ..reference import bits
from ..wide_reference import IS_WIDE
from . import cases
from .weights import BF16, F32, F64, Weight, weights

BACKENDS_HERE = {
    "cpu": (cases(200), {"far": IS_WIDE, "most": (60, 2000, 100_000)}),
    "eager": (max(1, cases(200) // 4), {"most": (60, 2000)}),
    "triton": (max(1, cases(200) // 20), {"most": (60, 600)}),
}
"""How many examples, and of what kind. Triton's interpreter takes 20 ms for a launch."""


@pytest.fixture(params=BACKENDS_HERE)
def on(request: pytest.FixtureRequest) -> str:
    if why := BACKENDS[request.param].reasons(torch.empty(0, device="cpu")):
        pytest.skip(f"{request.param}: {'; '.join(why)}")
    return request.param


def attack(on: str, check: Callable[[Weight], None], **options: object) -> None:
    """Many examples of a property."""
    examples, what = BACKENDS_HERE[on]

    @settings(max_examples=examples, deadline=None, derandomize=not cases(0))
    @given(weights(**what | options))
    def attacked(x: Weight) -> None:
        with wnkernel.use_backend(on):
            check(x)

    attacked()


def computed(x: Weight, v: Tensor, g: Tensor, grad_w: Tensor) -> dict[str, Tensor]:
    """w, and those gradients that are needed."""
    w = F.weight_norm(v, g, x.dim, eps=x.bound(v), out_dtype=x.out_dtype)
    needed = {f"grad_{name}": t for name, t in (("v", v), ("g", g)) if t.requires_grad}
    grads = torch.autograd.grad(w, [*needed.values()], grad_w)
    return {"w": w.detach(), **dict(zip(needed, grads, strict=True))}


def test_values_are_right(on):
    attack(on, is_right)


def is_right(x: Weight) -> None:
    v, g, grad_w = x.tensors()
    got = computed(x, v, g, grad_w)
    want = wide_reference.weight_norm(v, g, grad_w, x.dim, x.bound(v), rows=True)
    for name, result in got.items():
        like = {"w": grad_w, "grad_v": v, "grad_g": g}[name]
        assert (result.shape, result.dtype) == (like.shape, like.dtype), name
        wide_reference.assert_close_where_it_fits(name, result, getattr(want, name))
    if "grad_v" in got and x.eps == "none":
        wide_reference.assert_across(v, got["grad_v"], want.grad_v, x.dim)


def test_bad_numbers_stay_in_their_row(on):
    attack(on, stays_in_its_row)


def stays_in_its_row(x: Weight) -> None:
    if x.is_whole or math.prod(x.shape) == 0:
        return
    v, g, grad_w = x.tensors()
    bound = x.bound(v)
    options = {"dim": x.dim, "eps": bound, "out_dtype": x.out_dtype}
    trained = [t for t in (v, g) if t.requires_grad]
    results = []
    for spoil in (False, True):
        if spoil:
            row = x.seed % v.shape[x.dim]
            with torch.no_grad():
                spoiled = x.rows(v)[row]
                spoiled[(0,) * spoiled.ndim] = (math.inf, -math.inf, math.nan)[x.seed % 3]
        w = F.weight_norm(v, g, **options)
        results.append((w.detach(), *torch.autograd.grad(w, trained, grad_w)))
    others = [k for k in range(v.shape[x.dim]) if k != row]
    for clean, got in zip(*results, strict=True):
        assert torch.equal(bits(x.rows(got)[others]), bits(x.rows(clean)[others]))
    assert not x.rows(results[1][0])[row][(0,) * spoiled.ndim].isfinite()


def test_the_length_of_v_is_no_matter(on):
    """To the bit, for powers of two."""
    attack(on, forgets_the_length, far=False, dtypes=(BF16, F32, F64))


def forgets_the_length(x: Weight) -> None:
    v, g, grad_w = (t.detach() for t in x.tensors())
    options = {"dim": x.dim, "out_dtype": x.out_dtype}
    w = F.weight_norm(v, g, **options)

    def of_length(times: float) -> Tensor:
        return F.weight_norm(x.memory.filled(v * times, v.dtype), g, **options)

    for k in (-3, 5):
        assert torch.equal(bits(of_length(2.0**k)), bits(w))
    want = wide_reference.weight_norm(v, g, grad_w, x.dim, rows=True).w
    rounded = torch.finfo(v.dtype).eps * want.scale  # v * 1.7 is rounded
    near = wide_reference.with_error(want, 2 * rounded)
    wide_reference.assert_close_where_it_fits("w", of_length(1.7), near)
