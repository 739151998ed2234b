"""The Triton kernels at the ends of the float range; see tests/triton/test_tiles.py, too."""

from __future__ import annotations

import pytest
import torch

from wnkernel.problem import bound_of

from .. import wide_reference
from ..cases import ENDS
from ..wide_reference import IS_WIDE, NOT_WIDE
from .cases import fresh, needs_triton, rows_case, run, split_early

pytestmark = [needs_triton, pytest.mark.skipif(not IS_WIDE, reason=NOT_WIDE)]

VIEWS = {
    "rows": (1, 3, 60),
    "strips": (30, 3, 4),
    "a run": (1, 1, 9000),
    "a split run": (1, 3, 40_000),
    "split strips": (3000, 3, 4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_results_that_fit(monkeypatch, view, dtype):
    fresh(monkeypatch)
    if "split" in view:
        split_early(monkeypatch)
    cases = []
    for of, *sizes, eps in ENDS.values():
        if of == dtype:
            cases.append(c := rows_case(*VIEWS[view], dtype, eps=eps))
            for t, size in zip((c.v, c.g, c.grad_w), sizes, strict=True):
                t.mul_(size)
    for c, got in zip(cases, run(cases), strict=True):
        eps = bound_of(c.eps, dtype)
        want = wide_reference.weight_norm(c.v, c.g, c.grad_w, c.dim, eps)
        want.assert_close(got.w, got.grad_v, got.grad_g)
