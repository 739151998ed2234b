"""normalize_ against its formula in float64, for every dtype, dim, norm and memory order."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from wnkernel import normalize_, norms_of

from ..cases import (
    DENSE_LAYOUTS,
    DTYPES,
    EMPTY_SHAPES,
    LAYOUTS,
    SHAPES,
    g_shape,
    layout_dims,
    randn,
    randn_g,
    shape_dims,
)
from ..reference import bits
from .expected import assert_normal, assert_normalizes, assert_norms

SHAPE = (6, 4, 5)
F16, BF16, F32, F64 = DTYPES
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

DIMS = {
    None: (0, 1, 2),
    0: (1, 2),
    1: (0, 2),
    2: (0, 1),
    -1: (0, 1, 2),
    -2: (0, 2),
    -3: (1, 2),
}
"""Every dim, and the dims that a norm is over."""
all_dims = pytest.mark.parametrize("dim", DIMS)

LONG = {
    "runs": ((2, 70_001), 0),  # two phases on the CPU: rows of over 65,536 elements
    "whole": ((3, 2, 20_011), None),
    "separate runs": ((3, 2, 30_000), 1),  # a row lies in three places
    "strips": ((300, 9, 2), 1),  # rows of many short runs
    "long strips": ((70_001, 3), 1),  # the same in two phases
}
"""Long rows: a shape and a dim."""
long_rows = pytest.mark.parametrize(("shape", "dim"), LONG.values(), ids=LONG)


def rows(x: Tensor, dim: int | None) -> Tensor:
    """A view with the rows first."""
    return x[None] if dim is None else x.movedim(dim, 0)


@all_dtypes
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(backend: str, shape: str, dtype: torch.dtype) -> None:
    for dim in (None, *range(len(SHAPES[shape]))):
        assert_normalizes(randn(SHAPES[shape], dtype), dim)


@all_dims
def test_dims(route: str, dim: int | None) -> None:
    assert_normalizes(randn(SHAPE), dim, norm=2.5)


def test_dim_is_0_and_norm_1_by_default(route: str) -> None:
    x = randn(SHAPE)
    before = x.clone()
    assert normalize_(x) is None
    assert_normal(x, before, 0, 1.0)


# Norms


@all_dtypes
def test_a_number(backend: str, dtype: torch.dtype) -> None:
    for norm in (0, 1, 0.3, 7, 2.0**-20):
        assert_normalizes(randn(SHAPE, dtype), 1, norm)


@all_dtypes
def test_a_norm_for_each_row(backend: str, dtype: torch.dtype) -> None:
    """Of any dtype and of either sign."""
    for dim in (None, 0, 1, -3):
        for norm_dtype in DTYPES:
            assert_normalizes(randn(SHAPE, dtype), dim, randn_g(SHAPE, dim, norm_dtype))


def test_norms_in_any_memory_order(backend: str) -> None:
    for norm in (
        randn((6, 2))[:, :1, None],
        torch.ones(()).expand(6, 1, 1),
        randn((6,)).requires_grad_()[:, None, None],
        torch.view_as_complex(randn((6, 1, 1, 2))).conj().imag,  # a sign that no memory has
    ):
        assert_normalizes(randn(SHAPE), 0, norm)
    x = randn(SHAPE)
    normalize_(x, None, norm=torch.full((1,), 3.0))  # as fully_shard has them
    torch.testing.assert_close(x.norm(), torch.tensor(3.0))


@all_dtypes
def test_sqrt_numel_gives_elements_a_mean_square_of_one(backend: str, dtype: torch.dtype) -> None:
    for dim, others in DIMS.items():
        x = randn(SHAPE, dtype)
        count = math.prod(SHAPE[k] for k in others)
        assert_normalizes(x, dim, "sqrt_numel", r=math.sqrt(count))
        means = x.double().square().mean(others)
        torch.testing.assert_close(means, torch.ones_like(means), rtol=2e-2, atol=0)


@all_dtypes
def test_keep_gives_back_the_norms_that_were_found(backend: str, dtype: torch.dtype) -> None:
    for dim in DIMS:
        x = randn(SHAPE, dtype)
        found = norms_of(x, dim)
        assert_norms(found, x, dim)
        kept = found.clone()
        found.zero_()  # they are the caller's
        for _ in range(3):
            x.mul_(1.5).add_(0.1)
            assert_normalizes(x, dim, "keep", r=kept)


def test_keep_is_for_each_dim_and_the_last_call_counts(route: str) -> None:
    x = randn(SHAPE)
    norms_of(x, 0)
    x.mul_(2)
    by_row, whole = norms_of(x, 0), norms_of(x, None)
    x.mul_(3)
    assert_normalizes(x.clone(), 0, by_row)
    assert_normalizes(x, 0, "keep", r=by_row)
    x.mul_(5)
    assert_normalizes(x, -1, "keep", r=whole)  # -1 is None, and 0 is -3
    assert_normalizes(x, -3, "keep", r=by_row)


@pytest.mark.parametrize("eps", [1e-12, 1.0, 40.0])
@all_dtypes
def test_eps_bounds_what_rows_are_divided_by(backend: str, eps: float, dtype: torch.dtype) -> None:
    x = randn((40, 20), dtype) * torch.logspace(-2, 1, 40)[:, None].to(dtype)
    x[3] = 0
    assert_normalizes(x, 0, 2.0, eps)
    assert x[3].eq(0).all()
    norms = x.double().norm(dim=1)
    assert norms.max() < 2.02
    assert (norms[:3] < 0.5).all() == (eps > 0.5)


# Memory


@pytest.mark.parametrize(("layout", "dim"), layout_dims([*DENSE_LAYOUTS, "gaps", "cut"]))
def test_layouts(backend: str, layout: str, dim: int | None) -> None:
    x = randn(LAYOUTS[layout], F32, layout)
    whole = x if x._base is None else x._base
    values = x.clone()
    whole.fill_(7.0)
    x.copy_(values)
    assert_normalizes(x, dim, 3.0)
    x.fill_(7.0)
    assert whole.eq(7.0).all()  # nothing else was written


@pytest.mark.parametrize("dtype", [F16, F64], ids=str)
def test_slices_of_one_tensor(backend: str, dtype: torch.dtype) -> None:
    """A part of a matrix, while the other parts stay."""
    whole = randn((8, 6), dtype)
    before = whole.clone()
    normalize_([whole[:3], whole[3:6, ::2]], dim=[0, 1], norm=[2.0, 3.0])
    assert_normal(whole[:3], before[:3], 0, 2.0)
    assert_normal(whole[3:6, ::2], before[3:6, ::2], 1, 3.0)
    assert torch.equal(whole[3:, 1::2], before[3:, 1::2])
    assert torch.equal(whole[6:], before[6:])


@pytest.mark.parametrize(("shape", "dim"), shape_dims(EMPTY_SHAPES))
def test_nothing_to_write(backend: str, shape: tuple[int, ...], dim: int | None) -> None:
    for norm in (1.0, "sqrt_numel", "keep", torch.ones(g_shape(shape, dim))):
        x = randn(shape)
        assert norms_of(x, dim).eq(0).all()
        found = normalize_(x, dim, norm=norm, return_norms=True)
        assert found.shape == g_shape(shape, dim)
        assert found.eq(0).all()
    assert normalize_([]) is None
    assert normalize_([], return_norms=True) == []


# Long rows and rows of extreme sizes


@pytest.mark.parametrize("dtype", [F16, F32, F64], ids=str)
@long_rows
def test_long_rows(backend: str, shape: tuple[int, ...], dim: int | None, dtype) -> None:
    x = randn(shape, dtype)
    if dim is not None:
        rows(x, dim)[1] = 0
    assert_normalizes(x, dim, randn_g(shape, dim))
    assert dim is None or rows(x, dim)[1].eq(0).all()


@pytest.mark.parametrize("size", [1e30, 1e-30])
@long_rows
def test_long_rows_whose_squares_leave_the_float_range(
    route: str, shape: tuple[int, ...], dim: int | None, size: float
) -> None:
    """A row beside it is of usual size, and one is of zeros."""
    x = randn(shape)
    rows(x, dim)[0] *= size
    if dim is not None and x.shape[dim] > 2:
        rows(x, dim)[2] = 0
    assert_normalizes(x, dim, 2.0)


@pytest.mark.parametrize(
    ("size", "dtype"), [(1e30, F32), (1e-30, BF16), (1e200, F64), (1e-200, F64)]
)
@all_dims
def test_rows_whose_squares_leave_the_float_range(
    route: str, dim: int | None, size: float, dtype: torch.dtype
) -> None:
    for norm in (1.0, 1e3, randn_g(SHAPE, dim)):
        assert_normalizes(randn(SHAPE, dtype) * size, dim, norm)


@pytest.mark.parametrize(("size", "dtype"), [(1e-42, F32), (1e-39, BF16), (1e-310, F64)])
@pytest.mark.parametrize(("shape", "dim"), [(SHAPE, 0), (SHAPE, 1), *LONG.values()])
def test_subnormal_rows(
    compiled_backend: str, shape: tuple[int, ...], dim: int | None, size: float, dtype
) -> None:
    x = (randn(shape, F64) * size).to(dtype)
    assert_normalizes(x, dim, 3.0)


def test_tiny_rows_of_float16(backend: str) -> None:
    assert_normalizes((randn(SHAPE) * 1e-6).half(), 0)


@pytest.mark.parametrize("shape", [(4, 6), (4, 70_001), (300, 4)], ids=str)
def test_nan_and_inf_spoil_no_other_row(route: str, shape: tuple[int, ...]) -> None:
    """Rows with NaN become NaN, and of rows with inf the inf, which is divided by itself."""
    dim = 1 if shape[1] == 4 else 0
    x = randn(shape)
    first = rows(x, dim)
    first[0, 2], first[1, 3], first[2, 0] = math.nan, math.inf, -math.inf
    assert_normalizes(x, dim)
    first = rows(x, dim)
    assert first[0].isnan().all()
    assert first[1].isnan().sum() == first[2].isnan().sum() == 1
    assert first[3].isfinite().all()


@all_dtypes
def test_rows_of_zeros_stay(route: str, dtype: torch.dtype) -> None:
    """To the bit, alone and in a list, with any norm, and those of -0 too."""
    shapes = [(SHAPE, 0), (SHAPE, 1), (SHAPE, None), ((5,), 0), *LONG.values()]
    for norm in (1.0, 0.0, "sqrt_numel"):
        xs = [torch.zeros(shape, dtype=dtype) for shape, _ in shapes]
        xs[0].neg_()
        before = [bits(x).clone() for x in xs]
        dims = [dim for _, dim in shapes]
        for x, dim in zip(xs[:4], dims, strict=False):
            assert normalize_(x, dim, norm=norm, return_norms=True).eq(0).all()
        for found in normalize_(xs, dims, norm=norm, return_norms=True):
            assert found.eq(0).all()
        assert all(map(torch.equal, map(bits, xs), before))


# What others compute


@pytest.mark.parametrize("shape", [(8, 5), (6, 4, 3, 3)], ids=str)
def test_forced_weight_norm_of_edm2(route: str, shape: tuple[int, ...]) -> None:
    """Karras et al. 2024, without their eps of 1e-4, which they add to the norm."""
    w = randn(shape, F64)
    norm = torch.linalg.vector_norm(w, dim=list(range(1, w.ndim)), keepdim=True)
    want = w / (0 + norm * math.sqrt(norm.numel() / w.numel()))
    normalize_(w, norm="sqrt_numel")
    torch.testing.assert_close(w, want)


@pytest.mark.parametrize("idim", [0, 1])
def test_justnorm_of_ngpt(route: str, idim: int) -> None:
    """``justnorm`` of Loshchilov et al. 2024 names the dimension that it sums over."""
    w = randn((8, 5), F64)
    want = w / w.norm(p=2, dim=idim, keepdim=True)
    normalize_(w, dim=1 - idim)
    torch.testing.assert_close(w, want)
