"""Weights of more than 2**31 elements: offsets need 64 bits. One for every way of cutting."""

from __future__ import annotations

import fcntl
import gc
import tempfile
from collections.abc import Iterator
from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wnkernel import functional as F

LIMIT = 2**31
DTYPE = torch.bfloat16
PART = 2**25
"""Elements that are compared at once, in float64."""

ARRAYS = 5
"""v, w, grad_w, grad_v, and room for what is compared."""

# [outer, rows, inner]; a single row is the whole tensor.
VIEWS = {
    "rows": (1, LIMIT // 2048 + 3, 2048),
    "odd rows": (1, LIMIT // 63 + 5, 63),
    "long rows": (1, 5, LIMIT // 5 // 8 * 8 + 8),
    "odd whole": (1, 1, LIMIT + 4097),
    "runs": (2**14 + 1, 2**10, 136),
    "odd runs": (2**14 + 1, 1023, 131),
    "columns": (2**21 + 1, 1032, 1),
    "odd columns": (2**21 + 1, 1027, 1),
    "wide": (4100, 524_296, 1),  # lines half a million elements apart
}


def parts(size: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Cuts along the longest dim."""
    along = size.index(max(size))
    step = max(1, PART * size[along] // prod(size))
    for k in range(0, size[along], step):
        yield tuple(slice(k, k + step) if dim == along else slice(None) for dim in range(len(size)))


def of_rows(t: Tensor, part: tuple[slice, ...]) -> Tensor:
    """The part of a ``[1, rows, 1]`` that belongs to a part of a weight."""
    return t[:, part[1]]


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """``[1, rows, 1]`` in float64."""
    total = torch.zeros(1, a.shape[1], 1, dtype=torch.float64)
    for part in parts(tuple(a.shape)):
        products = a[part].double() * b[part].double()
        of_rows(total, part).add_(products.sum((0, 2), keepdim=True))
    return total


def uniform(size: tuple[int, ...]) -> Tensor:
    """Positive, so that rows of v and grad_w are far from orthogonal."""
    t = torch.empty(size, dtype=DTYPE)
    for part in parts(size):
        t[part].uniform_(0.5, 1.5)
    return t


def assert_near(name: str, got: Tensor, want: Tensor) -> None:
    """Half a neighbour's distance in bfloat16, and what float32 sums leave of cancelled terms."""
    error = (got.double() - want).abs()
    allowed = 2**-8 * want.abs() + 1e-3 * want.abs().mean()
    assert (error <= allowed).all(), f"{name}: {int((error > allowed).sum())} elements are wrong"


@pytest.fixture
def room() -> Iterator[None]:
    """Enough memory, which tests in other processes take one after the other."""
    needed = ARRAYS * 2 * LIMIT
    with Path(tempfile.gettempdir(), "wnkernel-large-tests").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        free, _ = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
        if free < needed:
            pytest.skip(f"needs {needed / 1e9:.0f} GB of a GPU's memory, {free / 1e9:.0f} are free")
        yield
        gc.collect()
        torch.cuda.empty_cache()


@pytest.mark.parametrize("name", VIEWS)
def test_more_elements_than_32_bits_count(gpu_backend, room, name):
    size = VIEWS[name]
    assert prod(size) > LIMIT
    v, grad_w = uniform(size).requires_grad_(), uniform(size)
    dim = None if size[1] == 1 else 1
    g = (torch.rand(() if dim is None else (1, size[1], 1)) + 0.5).requires_grad_()
    w = F.weight_norm(v, g, dim)
    grad_v, grad_g = torch.autograd.grad(w, (v, g), grad_w)
    with torch.no_grad():
        norm = row_dots(v, v).sqrt()
        dots = row_dots(grad_w, v) / norm
        assert_near("grad_g", grad_g.view_as(dots), dots)
        scale = g.detach().double().view_as(norm) / norm
        for part in parts(size):
            n, s, ratio = (of_rows(t, part) for t in (norm, dots, scale))
            assert_near("w", w.detach()[part], v[part].double() * ratio)
            across = grad_w[part].double() - v[part].double() / n * s
            assert_near("grad_v", grad_v[part], ratio * across)
