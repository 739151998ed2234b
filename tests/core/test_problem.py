"""The rules of ``dim`` and memory order, against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import wnkernel
from wnkernel import native
from wnkernel._versions import release
from wnkernel.problem import (
    WHOLE_TENSOR,
    accumulation_dtype,
    canonical_dim,
    is_dense,
    norm_shape,
    row_view,
)

SIZES = st.integers(1, 5)


@st.composite
def dense(draw, sizes=SIZES, max_dims=5):
    """A dense tensor of distinct numbers in some memory order, at some offset."""
    shape = draw(st.lists(sizes, min_size=1, max_size=max_dims))
    order = draw(st.permutations(range(len(shape))))
    offset = draw(st.integers(0, 3))
    n = torch.Size(shape).numel()
    flat = torch.arange(n + offset)[offset:]
    return flat.view([shape[k] for k in order]).permute([order.index(k) for k in range(len(shape))])


def distinct_addresses(t):
    """Brute force: the storage offset of every element."""
    index = torch.zeros(t.shape, dtype=torch.int64)
    for k, (n, stride) in enumerate(zip(t.shape, t.stride(), strict=True)):
        index += (torch.arange(n) * stride).view([-1 if j == k else 1 for j in range(t.ndim)])
    return index.unique()


def fills_memory(t):
    found = distinct_addresses(t)
    return found.numel() == t.numel() and int(found[-1] - found[0]) == t.numel() - 1


@given(dense())
def test_permuted_tensors_are_dense(t):
    assert is_dense(t)
    assert fills_memory(t)


@given(dense(), st.data())
def test_is_dense_on_any_strides(t, data):
    """Slices, repeats and overlaps; strides of single-element dims never matter."""
    strides = [data.draw(st.sampled_from([s, 2 * s, 1, 0, s + 1])) for s in t.stride()]
    reach = sum((n - 1) * s for n, s in zip(t.shape, strides, strict=True))
    other = torch.arange(reach + 1).as_strided(t.shape, strides)
    assert is_dense(other) == fills_memory(other)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)])
def test_is_dense_on_empty_tensors(shape):
    is_dense(torch.empty(shape))  # either answer will do, an exception will not


@given(dense(), st.data())
def test_row_view_covers_the_rows(t, data):
    dim = data.draw(st.integers(WHOLE_TENSOR, t.ndim - 1))
    view = row_view(t, dim)
    assert view.outer * view.rows * view.inner == t.numel()
    memory = torch.as_strided(t, (view.outer, view.rows, view.inner), _contiguous(view))
    if dim == WHOLE_TENSOR:
        assert view.rows == 1
        assert set(memory.flatten().tolist()) == set(t.flatten().tolist())
        return
    assert view.rows == t.shape[dim]
    for row in range(view.rows):
        got = memory[:, row].flatten().sort().values
        assert torch.equal(got, t.select(dim, row).flatten().sort().values)


@pytest.mark.skipif(not native.loaded(), reason=native.load_error())
@given(dense(), st.data())
def test_row_view_in_cpp_is_the_same(t, data):
    from wnkernel import _C

    dim = data.draw(st.integers(WHOLE_TENSOR, t.ndim - 1))
    view = row_view(t, dim)
    assert tuple(_C.row_view(t, dim)) == (view.outer, view.rows, view.inner)


@given(dense(max_dims=4), st.data())
def test_row_view_gives_the_norms(t, data):
    dim = data.draw(st.integers(0, t.ndim - 1))
    t = t.double()
    view = row_view(t, dim)
    memory = torch.as_strided(t, (view.outer, view.rows, view.inner), _contiguous(view))
    want = torch.linalg.vector_norm(t, dim=[k for k in range(t.ndim) if k != dim], keepdim=True)
    if t.ndim == 1:
        want = t.abs()
    assert want.shape == norm_shape(t.shape, dim)
    torch.testing.assert_close(memory.square().sum((0, 2)).sqrt(), want.flatten())


def _contiguous(view):
    return view.rows * view.inner, view.inner, 1


@given(st.integers(1, 6), st.integers(-9, 9))
def test_canonical_dim(ndim, dim):
    if dim == -1:
        assert canonical_dim(dim, ndim) == WHOLE_TENSOR
    elif -ndim <= dim < ndim:
        assert canonical_dim(dim, ndim) == dim % ndim
    else:
        with pytest.raises(ValueError, match=rf"^dim: expected -{ndim} <= dim < {ndim}.*got {dim}"):
            canonical_dim(dim, ndim)


@pytest.mark.parametrize("ndim", [1, 2, 5])
def test_none_is_the_whole_tensor(ndim):
    assert canonical_dim(None, ndim) == WHOLE_TENSOR


@given(st.lists(SIZES, min_size=1, max_size=5), st.data())
def test_norm_shape_is_torchs(shape, data):
    dim = data.draw(st.integers(WHOLE_TENSOR, len(shape) - 1))
    want = torch.norm_except_dim(torch.ones(shape), 2, dim).shape
    assert norm_shape(torch.Size(shape), dim) == want


def test_norm_shape_of_empty_tensors():
    assert norm_shape(torch.Size((2, 0, 3)), 0) == (2, 1, 1)
    assert norm_shape(torch.Size((2, 0, 3)), 1) == (1, 0, 1)
    assert norm_shape(torch.Size((2, 0, 3)), WHOLE_TENSOR) == ()


def test_accumulation_dtype():
    assert accumulation_dtype(torch.float64) == torch.float64
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert accumulation_dtype(dtype) == torch.float32


@pytest.mark.parametrize("dim", [np.int64(1), np.int32(-2), np.uint8(0), torch.tensor(1)])
def test_integers_of_other_kinds(route, dim):
    v, g = torch.ones(3, 4), torch.ones(norm_shape((3, 4), int(dim) % 2))
    torch.testing.assert_close(
        wnkernel.functional.weight_norm(v, g, dim),
        wnkernel.functional.weight_norm(v, g, int(dim)),
    )
    layer = wnkernel.weight_norm(torch.nn.Linear(4, 3), dim=dim)
    assert type(layer.parametrizations.weight[0].dim) is int
    layer(torch.ones(2, 4))


boolean = pytest.param(
    np.bool_(True),
    marks=pytest.mark.skipif(
        release(np.__version__) < (2, 3), reason="numpy 2.2 takes its booleans for integers"
    ),
)


@pytest.mark.parametrize("dim", [np.float32(1), boolean, torch.tensor(1.0), "0", True])
def test_what_is_no_integer(route, dim):
    v, g = torch.ones(3, 4), torch.ones(1, 4)
    with pytest.raises(TypeError):
        wnkernel.functional.weight_norm(v, g, dim)
    with pytest.raises(TypeError):
        wnkernel.weight_norm(torch.nn.Linear(4, 3), dim=dim)
