"""Weights of any shape, memory order, dtypes and sizes. Hypothesis draws what they are like and a
seed; torch draws the numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from .. import reference
from ..cases import DTYPES, g_shape

F16, BF16, F32, F64 = DTYPES
SIZES = [
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    13,
    15,
    16,
    17,
    31,
    32,
    33,
    63,
    65,
    127,
    129,
    257,
    1021,
    4097,
    9001,
    65537,
]
"""1, primes, powers of two and their neighbours."""

FAR = {
    F16: (2.0**-20, 2.0**12),
    BF16: (1e-39, 1e-30, 1e30, 1e37),
    F32: (1e-42, 1e-38, 1e-30, 1e30, 1e37),
    F64: (1e-310, 1e-300, 1e-160, 1e200, 1e307),
}
"""Of rows whose numbers, squares or norms come to the ends of the range."""
NEAR = {F16: (0.25, 8.0), BF16: (1e-10, 1e10), F32: (1e-10, 1e10), F64: (1e-100, 1e100)}
"""Of rows that every backend takes, torch's fused kernels too."""


@dataclass(frozen=True)
class Memory:
    """A memory order, every other element of a dimension only, and what lies before the first."""

    order: tuple[int, ...]
    gap: int | None
    offset: int
    expanded: bool = False

    def filled(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """These values there; where it is expanded, the first ones along the first dimension."""
        whole = values.shape
        if self.expanded and values.numel():
            values = values[:1]
        sizes = [n * (2 if k == self.gap else 1) for k, n in enumerate(values.shape)]
        there = [sizes[k] for k in self.order]
        t = torch.empty(self.offset + math.prod(there), dtype=dtype)[self.offset :].view(there)
        t = t.permute([self.order.index(k) for k in range(len(there))])
        if self.gap is not None:
            t = t[(slice(None),) * self.gap + (slice(None, None, 2),)]
        return t.copy_(values).expand(whole)


@dataclass(frozen=True)
class Weight:
    """A weight norm and the gradient of its result."""

    shape: tuple[int, ...]
    dim: int | None
    v_dtype: torch.dtype
    g_dtype: torch.dtype
    out_dtype: torch.dtype
    memory: Memory
    grad_memory: Memory
    sizes: tuple[float, ...]
    """Of the first rows' numbers."""
    g_size: float
    grad_size: float
    eps: str
    """"none", "tiny", or "between": some rows are below it."""
    need: tuple[bool, bool]
    """Which of v and g are trained."""
    seed: int

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """v, g and the gradient of w."""
        random = torch.Generator().manual_seed(self.seed)

        def randn(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float64)

        # Away from the ends: a norm or a product of a row has to fit where its numbers do.
        values = randn(self.shape).clamp(-3, 3)
        rows = self.rows(values)
        for k in range(min(len(self.sizes), rows.shape[0])):
            rows[k] *= self.sizes[k]
        v = self.memory.filled(values, self.v_dtype)
        g = (randn(g_shape(self.shape, self.dim)) * self.g_size).to(self.g_dtype)
        grad_w = self.grad_memory.filled(randn(self.shape) * self.grad_size, self.out_dtype)
        return v.requires_grad_(self.need[0]), g.requires_grad_(self.need[1]), grad_w

    def rows(self, t: Tensor) -> Tensor:
        """A view with the rows first."""
        return t[None] if self.is_whole else t.movedim(self.dim, 0)

    @property
    def is_whole(self) -> bool:
        return self.dim is None or self.dim == -1

    def bound(self, v: Tensor) -> float:
        """eps as a number."""
        if self.eps == "between" and v.numel():
            middle = float(reference.norm(v.detach(), self.dim).median())
            return middle * 1.001 if 1e-30 < middle < 1e30 else 1.0
        return {"none": 0.0, "tiny": 1e-12, "between": 1.0}[self.eps]


@st.composite
def memories(draw: st.DrawFn, ndim: int, *, expandable: bool = False) -> Memory:
    """channels_last is one of the orders."""
    ordered = st.just(tuple(range(ndim)))
    order = draw(ordered | st.permutations(range(ndim)).map(tuple))
    gap = draw(st.none() | st.integers(0, ndim - 1))
    expanded = expandable and gap is None and draw(st.booleans())
    return Memory(order, gap, draw(st.sampled_from([0, 0, 1, 3])), expanded)


@st.composite
def weights(
    draw: st.DrawFn,
    *,
    far: bool = False,
    most: Sequence[int],
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> Weight:
    """``far``: some rows of extreme sizes. ``most``: limits of elements, to choose from."""
    shape: list[int] = []
    most = draw(st.sampled_from(most))
    for _ in range(draw(st.integers(1, 5))):
        left = most // max(1, math.prod(shape))
        shape.append(draw(st.sampled_from([n for n in SIZES if n <= left])))
    if draw(st.integers(0, 19)) == 0:
        shape[draw(st.integers(0, len(shape) - 1))] = 0
    ndim = len(shape)
    dim = draw(st.none() | st.integers(-ndim, ndim - 1))
    v_dtype = draw(st.sampled_from(dtypes))
    others = st.just(v_dtype) | st.sampled_from(dtypes)
    ends = FAR if far else NEAR
    size = st.just(1.0) | st.sampled_from(ends[v_dtype])
    other_size = st.just(1.0) | st.sampled_from([1e-3, 1e3])
    return Weight(
        tuple(shape),
        dim,
        v_dtype,
        draw(others),
        draw(others),
        draw(memories(ndim)),
        draw(memories(ndim, expandable=True)),
        tuple(draw(st.lists(size | st.just(0.0) if far else size, max_size=3))),
        draw(other_size),
        draw(other_size),
        draw(st.sampled_from(["none", "tiny", "between"])),
        draw(st.sampled_from([(True, True), (True, True), (True, False), (False, True)])),
        draw(st.integers(0, 2**32 - 1)),
    )
