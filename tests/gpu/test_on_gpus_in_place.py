"""Kernels that write over what they read: normalize_ and forced weight norm, beside other work."""

from __future__ import annotations

import math

import pytest
import torch

import wnkernel
from wnkernel import functional as F
from wnkernel.problem import accumulation_dtype

from .. import reference
from ..cases import DTYPES
from .on_gpus import SHAPES, Weight, assert_same_bits, weights

RUNS = 20
"""A thread that reads what another has written already would not do so every time."""


def ones(c: Weight) -> torch.Tensor:
    """A g of 1, in the dtype of norms."""
    return torch.ones_like(c.g.detach(), dtype=accumulation_dtype(c.v.dtype))


@pytest.mark.parametrize("together", [False, True], ids=["singly", "listed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_has_the_bits_of_a_weight_norm(gpu_backend, dtype, together):
    chosen = weights(dtype)
    want = [F.weight_norm(c.v.detach(), ones(c), c.dim) for c in chosen]
    dims = [c.dim for c in chosen]
    other, busy = torch.cuda.Stream(), torch.randn(1 << 22)
    other.wait_stream(torch.cuda.current_stream())
    for _ in range(RUNS):
        got = [c.v.detach().clone() for c in chosen]
        with torch.cuda.stream(other):
            for _ in range(8):
                busy.mul_(1.0)
        if together:
            wnkernel.normalize_(got, dims)
        else:
            for t, dim in zip(got, dims, strict=True):
                wnkernel.normalize_(t, dim)
        assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_forced(gpu_backend, name, dtype):
    """The new v and w, against the formula of EDM2 in float64, and the same bits every time."""
    (c,) = weights(dtype, names=[name])
    norm = wnkernel.ForcedWeightNorm(c.dim, gain=1.5)
    rows = tuple(k for k in range(c.v.ndim) if k != c.dim)
    count = c.v.numel() // (1 if c.dim is None else c.v.shape[c.dim])

    def unit(t: torch.Tensor) -> torch.Tensor:
        return t / (1e-4 + t.square().mean(rows, keepdim=True).sqrt())

    new = unit(c.v.detach().double())
    want = [new, unit(new) * (1.5 / math.sqrt(count))]
    first: list[torch.Tensor] = []
    for _ in range(RUNS):
        v = c.v.detach().clone()
        got = [v, norm(v)]
        for name_of, t, exact in zip(("v", "w"), got, want, strict=True):
            expected = reference.Expected(exact, exact.abs(), count, accumulation_dtype(dtype))
            reference.assert_close(name_of, t, expected)
        first = first or got
        assert_same_bits(got, first)
