"""The backend that always runs, on any device. It has no kernels of its own: it calls torch's fused
kernels where they are right, and composes torch's operators elsewhere.

torch has fused kernels for the first and the last dim. Their first derivative is right, but their
second derivative is not. So this backend calls the two raw kernels, and never torch's autograd
around them. As with torch, float32 rows whose sum of squares leaves the float range give 0 or inf.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import composed
from .._versions import release
from ..problem import Problem, check


class EagerBackend:
    """Computes weight norms with torch's own operators, but without torch's autograd."""

    name = "eager"
    is_compiled = False
    is_traceable = True

    def missing(self) -> list[str]:
        return []

    def takes(self, v: Tensor) -> bool:
        return True

    def reasons(self, v: Tensor) -> list[str]:
        return []

    def is_automatic(self, v: Tensor) -> bool:
        return True

    def has_operators(self, v: Tensor) -> bool:
        return False

    def norm(self, v: Tensor, g: Tensor, dim: int, eps: float) -> Tensor:
        p = check(v, g, dim, eps)
        norm = _forward_one(p)[1]
        # torch's kernels give 0 or inf for rows whose squares leave the float range.
        is_right = (norm > 0) & norm.isfinite()
        return torch.where(is_right, norm, composed.norm_except_dim(v.to(p.acc_dtype), p.dim))

    def weights(self, problems: Sequence[Problem]) -> tuple[list[Tensor], list[Tensor]]:
        pairs = [_forward_one(p) for p in problems]
        return [w for w, _ in pairs], [norm for _, norm in pairs]

    def forced(
        self, problems: Sequence[Problem], forced: Sequence[float]
    ) -> tuple[list[Tensor], Sequence[Tensor]]:
        pairs = [
            composed.forced(p, norm) if norm else _forward_one(p)
            for p, norm in zip(problems, forced, strict=True)
        ]
        return [w for w, _ in pairs], [norm for _, norm in pairs]

    def normalize_(self, problems: Sequence[Problem]) -> list[Tensor]:
        return [composed.normalize_(p.v, p.g, p.dim, p.eps) for p in problems]

    def gradients(
        self,
        problems: Sequence[Problem],
        norms: Sequence[Tensor],
        grad_ws: Sequence[Tensor],
        need_v: Sequence[bool],
        need_g: Sequence[bool],
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        grads = [_backward_one(*args) for args in zip(problems, norms, grad_ws, strict=True)]
        return composed.wanted(grads, need_v, need_g)


# torch's CPU kernel takes float16 since torch 2.8.
_CPU_HAS_HALF = release(torch.__version__) >= (2, 8)


def torch_has_kernel(v: Tensor, dim: int) -> bool:
    """Return whether torch has a fused kernel for a canonical ``dim`` of ``v``."""
    return (
        v.device.type in ("cpu", "cuda")
        and (_CPU_HAS_HALF or v.dtype != torch.float16 or v.device.type != "cpu")
        and dim in (0, v.ndim - 1)
        and v.numel() > 0
    )


def _torch_is_right(p: Problem) -> bool:
    """Return whether torch's fused kernels give the result that we promise for ``p``."""
    return (
        torch_has_kernel(p.v, p.dim)
        and p.divisor_dtype == p.acc_dtype
        and p.eps == 0.0
        and p.v.dtype == p.g.dtype
        and (p.out_dtype == p.v.dtype or p.v.dtype == p.acc_dtype)  # else w is rounded twice
        and p.v.is_contiguous()
        and p.g.is_contiguous()
    )


def _forward_one(p: Problem) -> tuple[Tensor, Tensor]:
    if _torch_is_right(p):
        w, norm = torch._weight_norm_interface(p.v, p.g, p.dim)
        return w.to(p.out_dtype), norm
    acc = p.acc_dtype
    norm = composed.norm_except_dim(p.v.to(acc), p.dim).reshape(p.g.shape)
    divisor = composed.divided_by(composed.norm_held(norm, p.divisor_dtype), p.bound)
    return (p.v.to(acc) * (p.g.to(acc) / divisor)).to(p.out_dtype), norm


def _backward_one(p: Problem, norm: Tensor, grad_w: Tensor) -> tuple[Tensor, Tensor]:
    if _torch_is_right(p):
        return torch.ops.aten._weight_norm_interface_backward(
            grad_w.to(p.v.dtype).contiguous(), p.v, p.g, norm, p.dim
        )
    return composed.gradients(p, norm, grad_w)
