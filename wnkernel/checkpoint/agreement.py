"""Checks that the entries of a state dict for one weight agree: shapes, pairs, plain weights."""

from __future__ import annotations

from collections.abc import Container, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..observers import has_values
from ..problem import WHOLE_TENSOR, norm_shape

Pair = tuple[str, str]
"""The keys of a g and a v."""


def half(pair: Pair, keys: Container[str]) -> str | None:
    """The error if a dict has one key of a pair without the other, else None."""
    missing = [key for key in pair if key not in keys]
    if len(missing) != 1:
        return None
    present = pair[1 - pair.index(missing[0])]
    return f'expected "{missing[0]}" beside "{present}", got no such key'


def difference(pair: Pair, other: Pair, state_dict: Mapping[str, Any]) -> str | None:
    """The error if two pairs of one weight differ in any bit, else None."""
    for key, other_key in zip(pair, other, strict=True):
        if not same_bits(state_dict[key], state_dict[other_key]):
            return f'expected one g and one v, got "{key}" and "{other_key}", which differ'
    return None


def contradiction(key: str, plain: Tensor, w: Tensor | None, pair: Pair) -> str | None:
    """The error if a plain weight is not the ``w`` of the pair beside it, else None. A plain weight
    contradicts a ``w`` that cannot be computed (None)."""
    if w is not None and same_up_to_rounding(plain, w):
        return None
    return f'expected one weight, got "{key}", which is not that of "{pair[0]}" and "{pair[1]}"'


def infer_dim(g: torch.Size, v: torch.Size) -> int | None:
    """The canonical dim of a weight norm with a g and a v of these shapes; None if no dim fits.

    A g with more than one element fits one dim at most. A g with one element means one norm over
    all of v. If v has dims of size 1, the first of them that fits is taken; all others and the
    whole tensor would give the same w.
    """
    if len(g) == len(v):
        for dim in range(len(v)):
            if tuple(g) == norm_shape(v, dim):
                return dim
    one_element = g.numel() == 1 and len(g) in (0, 1, len(v))  # torch 0.3 saved shape (1,)
    return WHOLE_TENSOR if one_element and len(v) else None


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same to the last bit, NaN included.

    For tensors without values the shape and the dtype decide.
    """
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not (has_values(a) and has_values(b)):
        return True
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return torch.equal(a.detach().view(bits), b.detach().to(a.device).view(bits))


def same_up_to_rounding(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors may be the same weight, computed by two kernels or rounded to a narrower
    dtype."""
    if a.shape != b.shape:
        return False
    if not (has_values(a) and has_values(b)):
        return True
    rtol = max(_rounding(a.dtype), _rounding(b.dtype))
    # torch cannot promote float8
    wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    a, b = a.detach().to(wide), b.detach().to(a.device, wide)
    near = b.isfinite() & ((a - b).abs() <= rtol * b.abs())
    same = (a == b) | near | (a.isnan() & b.isnan())
    return bool(same.all())  # allclose has no rule for DTensors


def _rounding(dtype: torch.dtype) -> float:
    """The relative error of a weight that a dtype allows. Kernels sum in float32 at least, so the
    order of a sum does not show in half types."""
    return torch.finfo(dtype).eps * (2 if dtype.itemsize <= 2 else 16)


def identity(t: Tensor) -> Hashable:
    """A key that is equal for tensors that are one in memory, because ``state_dict`` makes
    separate tensors of tied ones. It tells storages apart on the meta device too, where none has
    an address."""
    storage = t.untyped_storage()._cdata
    return storage, t.storage_offset(), t.shape, t.stride(), t.dtype
