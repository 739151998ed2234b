"""The oracle where float64 ends: numpy's longdouble, 80 bits on x86, whose exponents go to 1e4932.

Where longdouble is no wider than float64, IS_WIDE is False, and extreme float64 has no oracle.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import reference
from .reference import Expected

Wide = np.longdouble
IS_WIDE = np.finfo(Wide).maxexp > 2 * np.finfo(np.float64).maxexp
NOT_WIDE = "numpy's longdouble is no wider than float64 here"


class Results(NamedTuple):
    w: Expected
    grad_v: Expected
    grad_g: Expected

    def assert_close(self, w: Tensor, grad_v: Tensor, grad_g: Tensor) -> None:
        """Compare all three by the table."""
        for name, got in zip(self._fields, (w, grad_v, grad_g), strict=True):
            want = getattr(self, name)
            reference.assert_close(name, got.view_as(want.value), want)


def weight_norm(
    v: Tensor, g: Tensor, grad_w: Tensor, dim: int | None, eps: float = 0.0, *, rows: bool = False
) -> Results:
    """A forward and a backward. ``rows``: errors are measured by the largest element of each row,
    not by every element: for rows that hold numbers 1e38 apart."""
    with np.errstate(all="ignore"):
        x, scale, y = (_wide(t) for t in (v, g, grad_w))
        whole = dim is None or dim == -1
        axes = tuple(k for k in range(v.ndim) if whole or k != dim % v.ndim)
        n = np.sqrt((x * x).sum(axes, keepdims=True))
        bounded, clamped = np.maximum(n, Wide(eps)), n < eps
        is_half = v.dtype in (torch.float16, torch.bfloat16)
        held = _wide(reference.divisor(v, g, dim)).reshape(n.shape) if is_half else n
        w = x * (scale.reshape(n.shape) / np.maximum(held, Wide(eps)))
        u, ratio = x / bounded, scale.reshape(n.shape) / bounded
        s, terms = (x.sum(axes, keepdims=True) for x in (y * u, np.abs(y * u)))
        grad_v = ratio * (y - np.where(clamped, 0, u * s))
        size_v = np.abs(ratio) * (np.abs(y) + np.abs(u) * terms)
        size_w = np.abs(w)
        if rows and v.numel():
            size_v, size_w = (t.max(axes, keepdims=True) + 0 * t for t in (size_v, size_w))
    length, acc = reference.length(v, dim), reference.acc_dtype(v)
    values = (w, size_w), (grad_v, size_v), (s.reshape(g.shape), terms.reshape(g.shape))
    return Results(*(Expected(_double(a), _double(b), length, acc) for a, b in values))


def _wide(t: Tensor) -> np.ndarray:
    return t.detach().cpu().to(torch.float64).numpy().astype(Wide)


def _double(x: np.ndarray) -> Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(np.asarray(x).astype(np.float64))


def assert_close_where_it_fits(name: str, got: Tensor, want: Expected) -> None:
    """Compare by the table what is well inside the range of got's dtype. Beyond it, got has to be
    large, or inf, and of the right sign."""
    largest = torch.finfo(got.dtype).max / 4
    beyond = (want.value.abs() > largest) | ~want.scale.isfinite() & want.value.isfinite()
    there = ~beyond
    reference.assert_close(
        name, got[there], replace(want, value=want.value[there], scale=want.scale[there])
    )
    sure = beyond & want.scale.isfinite() & (want.scale <= 2 * want.value.abs())
    wide = got[sure].double()
    assert (wide * want.value[sure].sign() > largest / 2).all(), f"{name}: too large, and is lost"


def assert_across(v: Tensor, grad_v: Tensor, want: Expected, dim: int | None) -> None:
    """grad_v and v at right angles, as nearly as grad_v's rounding allows."""
    axes = tuple(k for k in range(v.ndim) if dim in (None, -1) or k != dim % v.ndim)
    x, y, scale = (_wide(t) for t in (v, grad_v, want.scale))
    with np.errstate(all="ignore"):
        along = np.abs((x * y).sum(axes))
        limit = reference.tolerance(v.dtype, want.acc_dtype, want.length).element
        smallest = torch.finfo(v.dtype).smallest_normal * torch.finfo(v.dtype).eps
        allowed = (np.abs(x) * (limit * scale + smallest)).sum(axes)
        known = np.isfinite(along) & np.isfinite(allowed)
        assert (along[known] <= allowed[known]).all(), "grad_v has a part along v"


def with_error(want: Expected, error: Tensor) -> Expected:
    """The same for arguments that may be off by so much."""
    limit = reference.tolerance(torch.float64, want.acc_dtype, want.length).element
    return replace(want, scale=want.scale + error / limit)
