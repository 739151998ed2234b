"""g and v of a plain weight."""

from __future__ import annotations

import torch
from torch import Tensor

from . import functional
from .backends.eager import torch_has_kernel
from .observers import has_values
from .problem import check_v


def split_weight(weight: Tensor, dim: int, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """``(g, v)`` that give ``weight``: g is what our kernels divide by, so that w is v. Of a row
    shorter than ``eps`` that is ``eps``. A row of zeros without ``eps``, which has no direction,
    gets one: v is 1 there, so that w is 0 and not NaN, and can be trained."""
    return _with_directions(functional.norms_for(weight, check_v(weight, dim), eps), weight)


def _with_directions(g: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if has_values(g) and (zero := g == 0).any():
        v = torch.where(zero, 1.0, v)
    return g, v


def split_for_torch(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """``(g, v)`` from which torch's own weight norm computes ``weight``.

    Its norms are off by up to 1e-3 where rows are long, and on the first and the last dim its
    kernel divides by others than those of ``torch.norm_except_dim``. g is what it divides by, but
    for rows that it cannot compute: there g is right.
    """
    g, v = split_weight(weight, dim)
    if weight.numel() == 0:  # torch cannot: one of its views would have any number of columns
        return g, v
    if torch_has_kernel(weight, dim):
        ones = torch.ones_like(g)
        of_torch = torch._weight_norm_interface(weight.contiguous(), ones, dim)[1].to(g.dtype)
    else:
        of_torch = torch.norm_except_dim(weight, 2, dim)
    return torch.where((of_torch > 0) & of_torch.isfinite(), of_torch, g), v
