"""normalize_ of several tensors, and its bits: alone and in a list, for any number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from wnkernel import functional as F
from wnkernel import native, normalize_, norms_of

from ..cases import randn, randn_g
from ..reference import bits
from .expected import assert_normal, assert_norms

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

# (shape, dim, dtype, memory order)
TENSORS = [
    ((6, 4, 3), 0, F32, "contiguous"),
    ((5, 7), 1, BF16, "contiguous"),
    ((2, 70_001), 0, F32, "contiguous"),
    ((0, 3), 0, F32, "contiguous"),
    ((3, 4, 5), None, F64, "transposed"),
    ((70_001, 3), 1, F32, "contiguous"),
    ((7, 5, 3), 1, F32, "gaps"),
    ((3, 2, 30_000), -2, F16, "contiguous"),
    ((40, 512), 0, F32, "unaligned"),
    ((300, 40, 4), 1, F64, "contiguous"),
]
DIMS = [dim for _, dim, _, _ in TENSORS]


@pytest.fixture(autouse=True)
def _threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def tensors() -> list[Tensor]:
    """Mixed ones; each has a row of zeros and a row whose squares leave the float range."""
    xs = [randn(shape, dtype, layout) for shape, _, dtype, layout in TENSORS]
    for x, dim in zip(xs, DIMS, strict=True):
        if dim is not None and x.numel():
            x.select(dim, 1).zero_()
            if x.dtype in (F32, F64):
                x.select(dim, 0).mul_(1e30 if x.dtype == F32 else 1e-200)
    return xs


def copies(xs: list[Tensor]) -> list[Tensor]:
    """In the same memory orders, gaps and all."""
    return [
        randn(x.shape, x.dtype, layout).copy_(x)
        for x, (*_, layout) in zip(xs, TENSORS, strict=True)
    ]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(bits(a.contiguous()), bits(b.contiguous()))


def test_each_tensor_gets_its_own_dim_norm_and_dtype(route: str) -> None:
    xs = tensors()
    before = copies(xs)
    norms: list[float | str | Tensor] = [
        randn_g(x.shape, dim, BF16) for x, dim in zip(xs, DIMS, strict=True)
    ]
    norms[1], norms[2], norms[5] = 0.5, "sqrt_numel", 3
    expected = [70_001**0.5 if isinstance(norm, str) else norm for norm in norms]
    found = normalize_(xs, DIMS, norm=norms, eps=1e-3, return_norms=True)
    for x, y, dim, r, n in zip(xs, before, DIMS, expected, found, strict=True):
        assert_normal(x, y, dim, r, 1e-3)
        assert_norms(n, y, dim)


def test_one_dim_and_one_norm_are_for_all(route: str) -> None:
    xs, norm = [randn((6, n)) for n in (1, 5, 9)], randn((6, 1))
    before = [x.clone() for x in xs]
    assert normalize_(xs, -2, norm=norm) is None
    for x, y in zip(xs, before, strict=True):
        assert_normal(x, y, 0, norm)


@pytest.mark.parametrize("form", [list, tuple, iter, lambda xs: (x for x in xs)])
def test_any_iterable_of_tensors(route: str, form) -> None:
    """And of dims and norms; what comes back is a list."""
    xs = [randn((6, 5)), randn((3, 4))]
    before = [x.clone() for x in xs]
    kept = norms_of(form(xs), form([1, 0]))
    found = normalize_(form(xs), form([1, 0]), norm=form([2.0, 4]), return_norms=True)
    assert type(kept) is type(found) is list
    for x, y, dim, r, n, k in zip(xs, before, [1, 0], [2.0, 4], found, kept, strict=True):
        assert_normal(x, y, dim, r)
        assert_norms(n, y, dim)
        assert_norms(k, y, dim)
    assert type(norms_of(form(xs[:1]))) is list
    assert isinstance(norms_of(xs[0]), Tensor)


def test_keep_in_a_list(route: str) -> None:
    xs = tensors()
    kept = [norm.clone() for norm in norms_of(xs, DIMS)]
    for x in xs:
        x.mul_(0.5)
    before = copies(xs)
    normalize_(xs, DIMS, norm="keep")
    for x, y, dim, norm in zip(xs, before, DIMS, kept, strict=True):
        assert_normal(x, y, dim, norm)


# Bits, which the compiled backends promise


@pytest.mark.parametrize("order", [1, -1])
def test_bits_alone_and_in_a_list_for_any_number_of_threads(
    compiled_backend: str, order: int
) -> None:
    before = tensors()
    torch.set_num_threads(1)
    alone = copies(before)
    norms = [
        normalize_(x, dim, norm=1.5, return_norms=True) for x, dim in zip(alone, DIMS, strict=True)
    ]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        xs = copies(before)
        found = normalize_(xs[::order], DIMS[::order], norm=1.5, return_norms=True)
        assert_same(xs, alone)
        assert_same(found[::order], norms)


@pytest.mark.parametrize("threads", [1, 2])
def test_bits_in_a_list_that_no_cache_holds(compiled_backend: str, threads: int) -> None:
    """The CPU computes tensors that are read twice in batches. There are at least three here, and
    tensors that are read once lie between."""
    torch.set_num_threads(threads)
    machine = native.MACHINE
    room = max(machine["l2"], machine["l3"] // 8) * threads
    shape = (300_000, 3)
    count = min(max(2 * room // (4 * 900_000), 2) + 2, 24)  # of machines with huge caches, fewer
    before = [x for k in range(count) for x in (randn(shape), randn((2 + k, 5)))]
    dims = [1, 0] * count
    alone, xs = [x.clone() for x in before], [x.clone() for x in before]
    for x, dim in zip(alone, dims, strict=True):
        normalize_(x, dim)
    normalize_(xs, dims)
    assert_same(xs, alone)
    for k in (0, 1, -2, -1):
        assert_normal(xs[k], before[k], dims[k], 1.0)


@pytest.mark.parametrize("g_dtype", [None, F16, F64])
def test_bits_of_weight_norm(compiled_backend: str, g_dtype: torch.dtype | None) -> None:
    """Where no row is of zeros: weight norm divides these by 0. A norm of all elements is left out
    where v and g are halves: weight norm rounds it."""
    for shape, dim, dtype, layout in TENSORS:
        if dim is None and dtype == g_dtype == F16:
            continue
        v = randn(shape, dtype, layout)
        g = randn_g(shape, dim, g_dtype or dtype)
        w = F.weight_norm(v, g, dim)
        normalize_(v, dim, norm=g)
        assert_same([v], [w])


def test_rows_that_have_their_norm_keep_their_bits(compiled_backend: str) -> None:
    """So a step that changes nothing leaves nothing behind."""
    before = tensors()
    xs = copies(before)
    normalize_(xs, DIMS, norm=norms_of(xs, DIMS))
    assert_same(xs, before)


@pytest.mark.parametrize("factor", [0.25, 8.0])
def test_a_power_of_two_keeps_w_of_weight_norm(compiled_backend: str, factor: float) -> None:
    """v may be normalised now and then without a change of the model, as long as its dtype holds
    all digits of the smallest numbers, which float16 does not."""
    for shape, dim, dtype, layout in TENSORS:
        if dtype == F16 and factor < 1:
            continue
        v, g = randn(shape, dtype, layout), randn_g(shape, dim)
        before, w = v.clone(), F.weight_norm(v, g, dim)
        normalize_(v, dim, norm=norms_of(v, dim) * factor)
        assert_same([v, F.weight_norm(v, g, dim)], [before * factor, w])
