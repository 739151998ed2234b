"""What a list of weights comes to, whatever their addresses: results to allocate, and batches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import accumulate
from operator import attrgetter, or_
from typing import Any

import torch
from torch import Tensor

from ...forms import Problems
from ...problem import accumulation_dtype, bound_of, is_dense, row_view
from .arrays import Allocate
from .launch import Batch, Direction, Types
from .launch_table import VECTOR_BYTES
from .tables import Weight

SECTOR = 32
"""Bytes that a GPU writes at once: no two norms share any."""


BATCHES = 8
"""Patterns of odd addresses that are remembered of a list: gradients that lie in flat buffers have
many. Then all are forgotten."""

_size, _stride, _is_neg, _dtype = Tensor.size, Tensor.stride, Tensor.is_neg, attrgetter("dtype")


class Results:
    """Tensors to allocate: one like each of some others, but for the dtype."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.sizes = [tuple(t.size()) for t in tensors]
        self.strides = [t.stride() for t in tensors]

    def are_like(self, tensors: Sequence[Tensor]) -> bool:
        """Whether tensors have these sizes and strides."""
        return list(map(_stride, tensors)) == self.strides and self.sizes == [*map(_size, tensors)]

    def make(
        self,
        allocate: Allocate,
        dtypes: Sequence[torch.dtype],
        needed: Sequence[bool] | None = None,
    ) -> list[Any]:
        """One for each weight; None where it is not needed."""
        if needed is None or all(needed):
            return list(map(allocate, self.sizes, self.strides, dtypes))
        each = zip(needed, self.sizes, self.strides, dtypes, strict=True)
        return [allocate(*what) if is_needed else None for is_needed, *what in each]


class Packed:
    """Tensors in one piece of memory: one like each of some others, but for the dtype."""

    def __init__(self, tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> None:
        self._sizes = [t.size() for t in tensors]
        self._dtypes = dtypes
        ends = (t.numel() * d.itemsize for t, d in zip(tensors, dtypes, strict=True))
        *self._offsets, self._bytes = accumulate(
            (-(-n // SECTOR) * SECTOR for n in ends), initial=0
        )

    def make(self, allocate: Allocate) -> Tensor:
        """The memory."""
        return allocate((self._bytes,), (1,), torch.uint8)

    def addresses(self, memory: Tensor) -> list[int]:
        """Of every tensor."""
        first = memory.data_ptr()
        return [first + offset for offset in self._offsets]

    def tensor(self, memory: Tensor, k: int) -> Tensor:
        """One of them."""
        size, dtype, first = self._sizes[k], self._dtypes[k], self._offsets[k]
        return memory[first : first + size.numel() * dtype.itemsize].view(dtype).view(size)


class Group:
    """The weights of a list that have the same dtypes."""

    def __init__(self, types: Types, places: Sequence[int], many: Problems) -> None:
        self.types, self.places = types, places
        self._device = many.v[0].device
        self._views = [row_view(many.v[k], many.options[k][0]) for k in places]
        acc = accumulation_dtype(self.types.v)
        self._eps = [bound_of(many.options[k][1], acc) for k in places]
        self._is_all = len(places) == len(many)
        self._batches: dict[tuple[object, ...], Batch] = {}

    def of(self, columns: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        """The entries of this group."""
        if self._is_all:
            return columns
        return [[column[k] for k in self.places] for column in columns]

    def batch(self, direction: Direction, *like_v: Sequence[int]) -> Batch:
        """What to launch, given the addresses of the arrays that are laid out like v: accesses are
        as wide as all of them allow at the same offsets.

        Other dtypes of the others change nothing: a gradient in the dtype of autocast gives the
        bits that it gives after a cast.
        """
        bits = 0
        for column in like_v:
            bits |= reduce(or_, column)
        odd: tuple[bool, ...] = ()
        if bits % VECTOR_BYTES:
            odd = tuple(any(a % VECTOR_BYTES for a in each) for each in zip(*like_v, strict=True))
        key = direction, odd
        batch = self._batches.get(key)
        if batch is None:
            if len(self._batches) >= BATCHES:
                self._batches.clear()
            batch = self._batches[key] = self._batch(direction, odd or (False,) * len(self.places))
        return batch

    def _batch(self, direction: Direction, odd: Sequence[bool]) -> Batch:
        weights = [
            Weight(view.outer, view.rows, view.inner, 1 if o else self.types.vector, eps)
            for view, eps, o in zip(self._views, self._eps, odd, strict=True)
        ]
        return Batch(direction, self.types, weights, self._device)


class Layout:
    """What there is to know of a list of forms."""

    def __init__(self, many: Problems) -> None:
        self.device = many.v[0].device
        self.is_ready = all(map(_is_ready, many.v, many.g))
        """Whether kernels can read v and g where they are."""
        out_dtypes = [out_dtype for _, _, out_dtype in many.options]
        self.like_v, self.like_g = Results(many.v), Results(many.g)
        self.v_dtypes = [v.dtype for v in many.v]
        self.g_dtypes = [g.dtype for g in many.g]
        self.w_dtypes = out_dtypes
        self.norm_dtypes = [accumulation_dtype(v.dtype) for v in many.v]
        self.norms = Packed(many.g, self.norm_dtypes)
        self.empty: list[int] = []
        """Weights without elements."""
        places: dict[Types, list[int]] = {}
        for k, (v, g, w) in enumerate(zip(many.v, many.g, out_dtypes, strict=True)):
            if v.numel():
                places.setdefault(Types(v.dtype, g.dtype, w), []).append(k)
            else:
                self.empty.append(k)
        self.groups = [Group(*group, many) for group in places.items()] if self.is_ready else []

    def is_of(self, v: Sequence[Tensor], g: Sequence[Tensor]) -> bool:
        """Whether v and g, which kernels can read where they are, are of these forms now."""
        return (
            self.is_ready
            and self.like_v.are_like(v)
            and self.like_g.are_like(g)
            and list(map(_dtype, v)) == self.v_dtypes
            and list(map(_dtype, g)) == self.g_dtypes
            and not any(map(_is_neg, v))
            and not any(map(_is_neg, g))
        )


def _is_ready(v: Tensor, g: Tensor) -> bool:
    dense = (v.is_contiguous() or is_dense(v)) and g.is_contiguous()
    return dense and not (v.is_neg() or g.is_neg())
