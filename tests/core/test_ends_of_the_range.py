"""Rows, scales and bounds near the ends of the float range: results that fit are right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.func import jvp

from wnkernel import functional as F
from wnkernel.backends import AUTO

from .. import wide_reference
from ..cases import ENDS, randn, randn_g
from ..wide_reference import IS_WIDE, NOT_WIDE

F64 = torch.float64
SHAPE = (4, 4, 9)


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("end", ENDS)
def test_results_that_fit(compiled_backend, end, dim):
    dtype, *sizes, eps = ENDS[end]
    if dtype == F64 and not IS_WIDE:
        pytest.skip(NOT_WIDE)
    random = randn(SHAPE, F64), randn_g(SHAPE, dim, F64), randn(SHAPE, F64)
    v, g, grad_w = ((t * size).to(dtype) for t, size in zip(random, sizes, strict=True))
    want = wide_reference.weight_norm(v, g, grad_w, dim, eps)
    w = F.weight_norm(v.requires_grad_(), g.requires_grad_(), dim, eps=eps)
    want.assert_close(w, *torch.autograd.grad(w, (v, g), grad_w))


@pytest.mark.parametrize("eps", [1e-40, 1e-50, 1e-300])
@pytest.mark.parametrize("dim", [0, 1, None])
def test_zeros_under_a_bound_below_the_range(route, dim, eps):
    """The others count it as the smallest normal number, and nothing becomes NaN."""
    v = torch.zeros(SHAPE).requires_grad_()
    g, grad_w = torch.rand_like(randn_g(SHAPE, dim)), randn(SHAPE) * 1e-20
    w = F.weight_norm(v, g.requires_grad_(), dim, eps=eps)
    grad_v, grad_g = torch.autograd.grad(w, (v, g), grad_w)
    assert w.eq(0).all()
    assert grad_g.eq(0).all()
    bound = eps if route in ("cpu", "cuda", AUTO) else torch.finfo(v.dtype).smallest_normal
    torch.testing.assert_close(
        grad_v.double(), (grad_w.double() * g.double() / bound).float().double()
    )


def test_bounds_below_the_range_under_transforms():
    """Which compose w, and count such a bound as the smallest normal number."""
    v, g = torch.zeros(SHAPE), torch.rand(4, 1, 1)
    for f in (F.weight_norm, getattr(torch.ops.wnkernel, "weight_norm", F.weight_norm)):
        w, tangent = jvp(lambda v, f=f: f(v, g, 0, eps=1e-50), (v,), (torch.ones_like(v),))
        assert w.eq(0).all()
        bound = torch.finfo(v.dtype).smallest_normal
        torch.testing.assert_close(tangent, (g / bound).expand(SHAPE))


@pytest.mark.skipif(not IS_WIDE, reason=NOT_WIDE)
def test_numbers_far_apart_in_a_row(ops):
    """Neither the largest v nor the largest grad_w says how large their products are."""
    v = torch.tensor([[1e300, 1e-300, 5e-324, 0.0]], dtype=F64, device="cpu")
    grad_w = torch.tensor([[1e-300, 1e300, 1.0, 1e308]], dtype=F64, device="cpu")
    for size in (1e-308, 1.0, 1e300):
        g = torch.full((1, 1), size, dtype=F64, device="cpu").requires_grad_()
        want = wide_reference.weight_norm(v, g, grad_w, 0)
        w = F.weight_norm(v.requires_grad_(), g)
        want.assert_close(w, *torch.autograd.grad(w, (v, g), grad_w))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("size", [1e-60, 1e60])
def test_doubles_beside_a_v_of_another_type(ops, size, dim, dtype):
    """g, w and its gradient are far outside of the range of floats."""
    v = randn(SHAPE, dtype).cpu()
    g, grad_w = randn_g(SHAPE, dim, F64).cpu() * size, randn(SHAPE, F64).cpu() / size
    want = wide_reference.weight_norm(v, g, grad_w, dim)
    w = F.weight_norm(v.requires_grad_(), g.requires_grad_(), dim, out_dtype=F64)
    want.assert_close(w, *torch.autograd.grad(w, (v, g), grad_w))


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_long_extreme_rows_are_added_up_in_pairs(ops, size):
    """Of equal numbers the errors add up, when one is added after the other."""
    v = torch.full((2, 119_040), 0.9 * size, dtype=F64, device="cpu")
    norm = F.norm_except_dim(v)
    want = 0.9 * size * np.sqrt(119_040)
    assert float((norm / want - 1).abs().max()) < 32 * torch.finfo(F64).eps


@pytest.mark.parametrize("shape", [(1000, 512), (250, 70)], ids=str)
def test_columns_are_added_up_in_two_steps(ops, shape):
    """One after the other, equal numbers are off by five times the eps of float32 here."""
    v = torch.full(shape, 0.7, device="cpu")
    want = float(v[0, 0]) * np.sqrt(shape[0])
    error = (F.norm_except_dim(v, 1).double() / want - 1).abs().max()
    assert float(error) < 3 * torch.finfo(v.dtype).eps
