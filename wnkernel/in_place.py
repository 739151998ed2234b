"""The checks of tensors whose rows are about to be written to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import observers
from .problem import check_rows, is_dense, list_of


class Rows(NamedTuple):
    """A checked tensor and its canonical dim."""

    t: Tensor
    dim: int
    name: str


def rows_of(tensors: Any, dim: Any, argument: str = "tensors") -> list[Rows]:
    """Check a tensor or several, and their dims, which may be one for all.

    Raises:
        TypeError: if a tensor is not a dense floating-point tensor, or a dim is no int or None.
        ValueError: if a tensor is 0-dimensional, a dim is out of range, or their numbers differ.
    """
    if isinstance(tensors, Tensor):
        return [Rows(tensors, check_rows(argument, tensors, dim), argument)]
    many = list_of(argument, tensors)
    names = [f"{argument}[{k}]" for k in range(len(many))]
    dims = entries_of("dim", dim, len(many))
    each = zip(many, dims, names, strict=True)
    return [Rows(t, check_rows(name, t, d), name) for t, d, name in each]


def is_sequence(entries: object) -> bool:
    """Whether an argument has an entry for each tensor."""
    return isinstance(entries, Iterable) and not isinstance(entries, (str, Tensor))


def entries_of(name: str, value: Any, count: int) -> list[Any]:
    """An argument as a list with an entry for each tensor.

    Raises:
        ValueError: if it has another number of entries.
    """
    if not is_sequence(value):
        return [value] * count
    entries = list(value)
    if len(entries) != count:
        raise ValueError(f"{name}: expected {count} entries (one per tensor), got {len(entries)}")
    return entries


def check_writable(rows: Sequence[Rows]) -> None:
    """Check that every tensor may be written to, and that no two of them share memory.

    Raises:
        RuntimeError: if a tensor requires grad and grad mode is on, is an inference tensor outside
            of inference mode, or has elements but no memory.
        ValueError: if tensors, or elements of a tensor, share memory.
    """
    records = torch.is_grad_enabled()
    is_outside = not is_compiling() and not torch.is_inference_mode_enabled()
    have_addresses = not is_compiling() and observers.have_addresses([row.t for row in rows])
    places: dict[torch.device, list[tuple[int, int, str]]] = {}
    for t, _, name in rows:
        if records and t.requires_grad:
            raise RuntimeError(
                f"{name}: expected a tensor that does not require grad, or torch.no_grad(): "
                "normalize_ writes in place, and nothing is recorded for autograd"
            )
        if is_outside and t.is_inference():
            raise RuntimeError(
                f"{name}: expected a tensor that was not made in inference mode, which can be "
                "written to only there"
            )
        numel = size = t.numel()
        if not (t.is_contiguous() or is_dense(t)) and (size := _extent(t)) < numel:
            raise ValueError(
                f"{name}: expected a tensor whose elements do not share memory, got one of shape "
                f"{list(t.shape)} and strides {list(t.stride())}; call .clone() on it"
            )
        if not have_addresses or numel == 0 or t.is_meta or torch._is_functional_tensor(t):
            continue
        start = t.data_ptr()
        if start == 0 or not observers.has_memory(t):
            raise RuntimeError(
                f"{name}: expected a tensor with memory, got one of shape {list(t.shape)} whose "
                "storage was freed"
            )
        places.setdefault(t.device, []).append((start, start + size * t.element_size(), name))
    for of_device in places.values():
        of_device.sort()
        for (_, end, name), (start, _, other) in pairwise(of_device):
            if start < end:
                raise ValueError(
                    "tensors: expected tensors that do not share memory, but "
                    f"{name} and {other} do, or lie in the same stretch of it"
                )


def _extent(t: Tensor) -> int:
    """How many elements of memory lie from the first to the last element of ``t``; 0 if elements
    may share memory."""
    extent = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1 and stride < extent:
            return 0
        extent += (size - 1) * stride
    return extent
