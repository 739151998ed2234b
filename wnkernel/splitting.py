"""How a plain weight is split into g and v."""

from __future__ import annotations

import torch
from torch import Tensor

from . import functional
from .backends.eager import torch_has_kernel
from .observers import has_values
from .problem import check_v


def split_weight(weight: Tensor, dim: int, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """Split ``weight`` into ``(g, v)``: v is the weight, and g is the ``max(norm, eps)`` that the
    kernels divide by, so that w is v. Without ``eps`` a row of zeros has no direction, so its v
    becomes 1: then w is 0 instead of NaN, and can be trained."""
    return _with_directions(functional.norms_for(weight, check_v(weight, dim), eps), weight)


def _with_directions(g: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if has_values(g) and (zero := g == 0).any():
        v = torch.where(zero, 1.0, v)
    return g, v


def split_for_torch(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Split ``weight`` into ``(g, v)`` from which torch's own weight norm computes it.

    torch's norms are off by up to 1e-3 for long rows, and on the first and the last dim its kernel
    divides by other norms than those of ``torch.norm_except_dim``. g is the norm that torch divides
    by. For rows whose norm torch cannot compute, g is the right norm.
    """
    g, v = split_weight(weight, dim)
    if weight.numel() == 0:  # torch fails, because it cannot infer the columns of a view
        return g, v
    if torch_has_kernel(weight, dim):
        ones = torch.ones_like(g)
        of_torch = torch._weight_norm_interface(weight.contiguous(), ones, dim)[1].to(g.dtype)
    else:
        of_torch = torch.norm_except_dim(weight, 2, dim)
    return torch.where((of_torch > 0) & of_torch.isfinite(), of_torch, g), v
