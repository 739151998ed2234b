"""Weight norm and its gradients in float64, and how far from them others may be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Exact:
    """The results, and what errors of the gradients are proportional to: in both, terms cancel, and
    in ``grad_v`` all of them where rows have one element."""

    w: Tensor
    grad_v: Tensor
    grad_g: Tensor
    grad_v_terms: Tensor
    """The larger of the two whose difference is ``grad_v``."""
    grad_w_norm: Tensor
    """Of each row, in the shape of ``grad_g``."""


def exact(v: Tensor, g: Tensor, dim: int | None, grad_w: Tensor) -> Exact:
    """Composed of plain operators and differentiated by autograd, in float64, from the same inputs:
    it shares no formula with what is compared.

    Args:
        v: on a device that has float64.
        g: the norms wanted.
        dim: None, or one that ``v`` has not: one norm over the whole tensor.
        grad_w: the gradient of the output.
    """
    v, g = (t.detach().double().requires_grad_() for t in (v, g))
    grad_w = grad_w.detach().double()
    others = [k for k in range(v.ndim) if k != dim]

    def norm(t: Tensor) -> Tensor:
        return torch.linalg.vector_norm(t, dim=others, keepdim=True) if others else t.abs()

    scale = g.reshape(norm(v).shape) / norm(v)
    w = v * scale
    grad_v, grad_g = torch.autograd.grad(w, (v, g), grad_w)
    terms = (scale * grad_w).detach()
    return Exact(w.detach(), grad_v, grad_g, terms, norm(grad_w).reshape(g.shape))


def bound(dtype: torch.dtype, row_length: int, *, long_sums: bool) -> float:
    """Of the relative L2 error: half a rounding of the result, and what the sums over a row lose.

    Args:
        dtype: of the tensors.
        row_length: elements per norm.
        long_sums: whether a row may be summed in long runs, as torch's operators do: their error
            grows with the root of the length (6e-4 was seen in float32 for one norm over 17 M
            elements). Without it, sums have to be cut into chunks, and a row's length is no excuse.
    """
    return torch.finfo(dtype).eps / 2 + of_sums(dtype, row_length, long_sums=long_sums)


def of_sums(dtype: torch.dtype, row_length: int, *, long_sums: bool) -> float:
    """The part of :func:`bound` that sums lose."""
    accumulation = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return accumulation * (64 + (2 * row_length**0.5 if long_sums else 0))
