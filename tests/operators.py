"""Arguments of the operators ``torch.ops.wnkernel``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .cases import randn, randn_g

Problem = tuple[Tensor, Tensor, int]
"""v, g and dim."""


def arguments(
    dim: int | None,
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] = (3, 4, 5),
    layout: str = "contiguous",
    grad: bool = False,
) -> Problem:
    """Of weight_norm."""
    v, g = randn(shape, dtype, layout), randn_g(shape, dim, dtype)
    return v.requires_grad_(grad), g.requires_grad_(grad), -1 if dim is None else dim


def lists(*problems: Problem) -> tuple[list[Any], ...]:
    """Of backward, all but the last two."""
    v, g, dim = (list(column) for column in zip(*problems, strict=True))
    grad_w = [torch.randn_like(t) for t in v]
    norm = [
        reference.norm(t.detach(), d).to(torch.float64 if t.dtype == torch.float64 else torch.float)
        for t, d in zip(v, dim, strict=True)
    ]
    return grad_w, v, g, norm, dim, [0.0] * len(v)


def halves(results: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """What forward and backward return as one list: w and norm, or grad_v and grad_g."""
    count = len(results) // 2
    return results[:count], results[count:]
