"""Rows, scales and bounds near the ends of the float range: results that fit are right."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wnkernel import functional as F

from . import reference, wide_reference
from .cases import randn, randn_g
from .wide_reference import IS_WIDE, NOT_WIDE

F32, F64 = torch.float32, torch.float64
SHAPE = (4, 4, 9)

# dtype; the sizes of v, g and grad_w; eps.
USUAL_G = [
    pytest.param(F32, 1e-42, 1, 1e-10, 1e-20, id="subnormal rows under a bound"),
    pytest.param(F32, 1e10, 1e-30, 1e10, 0, id="g over norm is subnormal"),
    pytest.param(F32, 1e-30, 1e10, 1e-20, 0, id="g over norm overflows"),
    pytest.param(F32, 1, 1e-40, 1e20, 0, id="subnormal g"),
    pytest.param(F64, 1e-310, 1, 1e-10, 1, id="subnormal rows under a bound, float64"),
    pytest.param(F64, 1e150, 1e-170, 1, 0, id="g over norm is subnormal, float64"),
    pytest.param(F64, 1e200, 1e-200, 1e200, 0, id="g over norm underflows, float64"),
    pytest.param(F64, 1e-200, 1e200, 1e-200, 0, id="g over norm overflows, float64"),
]
ZEROS = [
    pytest.param(F32, 0, 1, 1e-20, 1e-50, id="zeros, a bound below the range"),
    pytest.param(F32, 0, 1e-20, 1e-10, 1e-40, id="zeros, a subnormal bound"),
    pytest.param(F64, 0, 1e-10, 1e-10, 1e-320, id="zeros, a subnormal bound, float64"),
]
SUBNORMAL_NORMS = [
    pytest.param(F32, 1e-42, 1e-10, 1e-10, 1e-50, id="subnormal rows, a bound below the range"),
    pytest.param(F32, 1e-42, 1, 1e-10, 1e-40, id="subnormal rows and bound"),
    pytest.param(F64, 1e-310, 1e-10, 1e-10, 1e-320, id="subnormal rows and bound, float64"),
]


def check(dtype, v_size, g_size, grad_size, eps, dim, *, only_forward=False):
    if dtype == F64 and not IS_WIDE:
        pytest.skip(NOT_WIDE)
    v, g, grad_w = (
        (t.clamp(-2, 2) * size).to(dtype)
        for t, size in (
            (randn(SHAPE, F64), v_size),
            (randn_g(SHAPE, dim, F64), g_size),
            (randn(SHAPE, F64), grad_size),
        )
    )
    want = wide_reference.weight_norm(v, g, grad_w, dim, eps)
    v.requires_grad_(), g.requires_grad_()
    w = F.weight_norm(v, g, dim, eps=eps)
    reference.assert_close("w", w, want.w)
    if only_forward:
        return
    grads = torch.autograd.grad(w, (v, g), grad_w)
    for name, got in zip(("grad_v", "grad_g"), grads, strict=True):
        reference.assert_close(name, got, getattr(want, name))


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize(("dtype", "v", "g", "grad", "eps"), [*USUAL_G, *ZEROS, *SUBNORMAL_NORMS])
def test_results_that_fit(compiled_backend, dtype, v, g, grad, eps, dim):
    check(dtype, v, g, grad, eps, dim)


@pytest.mark.skipif(not IS_WIDE, reason=NOT_WIDE)
def test_numbers_far_apart_in_a_row(ops):
    """Neither the largest v nor the largest grad_w says how large their products are."""
    v = torch.tensor([[1e300, 1e-300, 5e-324, 0.0]], dtype=F64, device="cpu")
    grad_w = torch.tensor([[1e-300, 1e300, 1.0, 1e308]], dtype=F64, device="cpu")
    for size in (1e-308, 1.0, 1e300):
        g = torch.full((1, 1), size, dtype=F64, device="cpu").requires_grad_()
        want = wide_reference.weight_norm(v, g, grad_w, 0)
        w = F.weight_norm(v.requires_grad_(), g)
        reference.assert_close("w", w, want.w)
        for name, got in zip(
            ("grad_v", "grad_g"), torch.autograd.grad(w, (v, g), grad_w), strict=True
        ):
            reference.assert_close(name, got, getattr(want, name))


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_long_extreme_rows_are_added_up_in_pairs(ops, size):
    """Of equal numbers the errors add up, when one is added after the other."""
    v = torch.full((2, 119_040), 0.9 * size, dtype=F64, device="cpu")
    norm = F.norm_except_dim(v)
    want = 0.9 * size * np.sqrt(119_040)
    assert float((norm / want - 1).abs().max()) < 32 * torch.finfo(F64).eps
