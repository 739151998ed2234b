"""Weight norm and its gradients in float64, and bounds on the errors of other results."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Exact:
    """The results in float64, and the sizes to which errors of the gradients are proportional. They
    are not proportional to the gradients themselves, because terms cancel: if rows have one
    element, ``grad_v`` is 0."""

    w: Tensor
    grad_v: Tensor
    grad_g: Tensor
    grad_v_terms: Tensor
    """``grad_w * g / norm``, the larger of the two terms whose difference is ``grad_v``."""
    grad_w_norm: Tensor
    """The norm of each row of ``grad_w``, in the shape of ``grad_g``."""


def exact(v: Tensor, g: Tensor, dim: int | None, grad_w: Tensor) -> Exact:
    """Compute w and its gradients in float64 with torch's operators and their autograd. This shares
    no formula with the backends.

    Args:
        v: the direction, on a device that has float64.
        g: the magnitude.
        dim: the dim of the weight norm; None or -1 for one norm over the whole tensor.
        grad_w: the gradient of w.
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
    """Return the bound on a relative L2 error: half a rounding of the result plus the error of the
    sums over a row.

    Args:
        dtype: the dtype of the tensors.
        row_length: the number of elements of a row.
        long_sums: whether a row may be summed in long runs, as torch's operators do. Their error
            grows with the square root of the length: 6e-4 was seen in float32 for one norm over
            17 M elements. If false, the bound does not grow with the length, which only sums in
            chunks achieve.
    """
    return torch.finfo(dtype).eps / 2 + of_sums(dtype, row_length, long_sums=long_sums)


def of_sums(dtype: torch.dtype, row_length: int, *, long_sums: bool) -> float:
    """Return the part of :func:`bound` for the error of the sums."""
    accumulation = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return accumulation * (64 + (2 * row_length**0.5 if long_sums else 0))
