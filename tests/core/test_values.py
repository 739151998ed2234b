"""The forward: values, dtypes, memory order, and the ends of the float range."""

from __future__ import annotations

import pytest
import torch
from torch.func import jvp, vmap

from wnkernel import functional as F
from wnkernel import native

from .. import reference
from ..cases import (
    DENSE_LAYOUTS,
    DTYPES,
    EMPTY_SHAPES,
    LAYOUTS,
    SHAPES,
    g_shape,
    layout_dims,
    mixed_dtypes,
    randn,
    randn_g,
    rounded_past_eps,
    shape_dims,
)


def check(v, g, dim, **options):
    w = F.weight_norm(v, g, dim, **options)
    assert w.dtype == options.get("out_dtype", v.dtype)
    reference.assert_close("w", w, reference.forward(v, g, dim, options.get("eps", 0.0)))
    return w


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim"), shape_dims(SHAPES))
def test_shapes(route, shape, dim, dtype):
    check(randn(shape, dtype), randn_g(shape, dim, dtype), dim)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim"), shape_dims(EMPTY_SHAPES))
def test_empty(route, shape, dim, dtype):
    w = F.weight_norm(randn(shape, dtype), randn_g(shape, dim, dtype), dim)
    assert w.shape == shape
    assert w.dtype == dtype


# One half type and one full type: loads differ, and nothing else does.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("layout", "dim"), layout_dims())
def test_layouts(route, layout, dim, dtype):
    shape = LAYOUTS[layout]
    check(randn(shape, dtype, layout), randn_g(shape, dim, dtype), dim)


@pytest.mark.parametrize(("layout", "dim"), layout_dims(DENSE_LAYOUTS))
def test_dense_memory_order_is_kept(route, layout, dim):
    shape = LAYOUTS[layout]
    v = randn(shape, torch.float32, layout)
    w = F.weight_norm(v, randn_g(shape, dim), dim)
    assert w.stride() == v.stride()


@pytest.mark.parametrize(("layout", "dim"), layout_dims(["gaps", "cut", "expanded"]))
def test_result_is_dense_and_its_own(route, layout, dim):
    shape = LAYOUTS[layout]
    v = randn(shape, torch.float32, layout)
    w = F.weight_norm(v, randn_g(shape, dim), dim)
    assert torch.ops.aten.is_non_overlapping_and_dense(w)
    assert w.untyped_storage().data_ptr() != v.untyped_storage().data_ptr()


@pytest.mark.parametrize(("v_dtype", "g_dtype", "out_dtype", "dim"), mixed_dtypes(DTYPES))
def test_mixed_dtypes(route, dim, v_dtype, g_dtype, out_dtype):
    v, g = randn((5, 6, 7), v_dtype), randn_g((5, 6, 7), dim, g_dtype)
    check(v, g, dim)
    check(v, g, dim, out_dtype=out_dtype)


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_out_dtype_is_a_cast(route, out_dtype):
    """What autocast would have computed, bit for bit, without its second pass."""
    v, g = randn((33, 17)), randn_g((33, 17), 0)
    assert torch.equal(F.weight_norm(v, g, out_dtype=out_dtype), F.weight_norm(v, g).to(out_dtype))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_g_in_any_strides(route, dim):
    shape = (6, 5, 4)
    n = shape[dim]
    v = randn(shape)
    spaced = torch.randn(3 * n)[::3].view(g_shape(shape, dim))
    repeated = torch.randn(1).expand(n).view(g_shape(shape, dim))
    last_first = torch.randn(n, 2)[:, 1].view(g_shape(shape, dim))
    odd_ones = spaced.as_strided(g_shape(shape, dim), [3 if k == dim else 17 for k in range(3)])
    for g in (spaced, repeated, last_first, odd_ones):
        check(v, g, dim)


@pytest.mark.parametrize("dim", [0, 1, 2, None])
def test_arguments_are_left_alone(route, dim):
    v, g = randn((6, 5, 4)), randn_g((6, 5, 4), dim)
    v_before, g_before = v.clone(), g.clone()
    F.weight_norm(v, g, dim)
    assert torch.equal(v, v_before)
    assert torch.equal(g, g_before)


def test_minus_one_is_the_whole_tensor(route):
    v, g = randn((6, 5, 4)), randn(())
    assert torch.equal(F.weight_norm(v, g, -1), F.weight_norm(v, g, None))


# Rows of a size whose squares overflow, underflow, or become subnormal, next to ordinary ones.
# bfloat16 has the range of float32; float16 rows have harmless squares but norms beyond float16.
RANGES = {
    torch.float16: (3e4, 1e-6),
    torch.bfloat16: (1e30, 1e-30, 1e-21),
    torch.float32: (1e30, 1e-30, 1e-21),
    torch.float64: (1e200, 1e-200, 1e-160),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1, 2, None])
def test_range(route, dim, dtype):
    if route == "eager" and dim in (0, 2) and dtype != torch.float16:
        pytest.skip(
            "eager follows torch's fused kernel on the first and last dim: rows whose squares "
            "leave the float range come out as 0 or inf there"
        )
    shape = (6, 6, 6)
    v = randn(shape, torch.float64).clamp(-2, 2)
    g = randn_g(shape, dim, dtype)
    for row, size in enumerate(RANGES[dtype]):
        (v if dim is None else v.select(dim, row)).mul_(size)
        if dim is None:
            check(v.to(dtype), g, dim)
            v /= size
    if dim is not None:
        check(v.to(dtype), g, dim)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_zero_row_is_nan_as_in_torch(route, dim, dtype):
    v, g = randn((4, 5, 6), dtype), randn_g((4, 5, 6), dim, dtype)
    v.select(dim, 2).zero_()
    w = check(v, g, dim)
    assert w.select(dim, 2).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1, 2, None])
def test_zero_row_with_eps(route, dim, dtype):
    v, g = randn((4, 5, 6), dtype), randn_g((4, 5, 6), dim, dtype)
    row = v if dim is None else v.select(dim, 2)
    row.zero_()
    w = check(v, g, dim, eps=1e-3)
    assert (w if dim is None else w.select(dim, 2)).eq(0).all()


@pytest.mark.parametrize("dim", [0, 1, 2, None])
def test_eps_is_a_lower_bound(route, dim):
    v, g = randn((4, 5, 6)), randn_g((4, 5, 6), dim)
    norms = reference.norm(v, dim)
    check(v, g, dim, eps=float(norms.min()) / 2)  # touches no row
    check(v, g, dim, eps=float(norms.mean()) * 1.001)  # some rows (the whole tensor, for None)
    check(v, g, dim, eps=float(norms.max()) * 2)  # every row


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_other_rows_survive_a_bad_one(route, dim, bad, dtype):
    v, g = randn((4, 5, 6), dtype), randn_g((4, 5, 6), dim, dtype)
    clean = F.weight_norm(v, g, dim)
    v.select(dim, 2)[1, 1] = bad
    w = check(v, g, dim)
    for row in (0, 1, 3):
        assert torch.equal(w.select(dim, row), clean.select(dim, row))


@pytest.mark.parametrize("side", ["below", "above"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_bound_between_one_norm_and_what_it_is_rounded_to(route, dtype, side):
    """The norm is rounded first, then bounded, by all backends and formulas."""
    v, eps = rounded_past_eps((20, 20), dtype, side)
    g = torch.ones((), dtype=dtype)
    options = {"eps": eps, "out_dtype": torch.float32}
    want = reference.forward(v, g, None, eps)
    reference.assert_close("w", F.weight_norm(v, g, None, **options), want)
    (w,) = vmap(lambda v: F.weight_norm(v, g, None, **options))(v[None])
    reference.assert_close("w", w, want)
    if native.loaded():
        operator = torch.ops.wnkernel.weight_norm
        w, tangent = jvp(lambda v: operator(v, g, -1, eps, torch.float32), (v,), (v,))
        reference.assert_close("w", w, want)
        # w does not change with the length of v, or, where eps counts, as v does.
        is_bounded = reference.norm(v, None) < eps
        error = (tangent - (w if is_bounded else 0)).abs().max()
        assert error < torch.finfo(dtype).eps * w.abs().max()
