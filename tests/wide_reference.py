"""The oracle where float64 ends: numpy's longdouble, 80 bits on x86, whose exponents go to 1e4932.

Where longdouble is no wider than float64, IS_WIDE is False, and extreme float64 has no oracle.
"""

from __future__ import annotations

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
