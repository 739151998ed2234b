"""Registers Triton kernels for ``torch.ops.wnkernel`` on GPUs for which ``wnkernel._C`` has none.

The operators have the same schemas and the same autograd in C++ there. torch.compile puts them into
its graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..problem import Problem, check_backward, check_forward
from ..streams import GPUS
from .eager import EagerBackend
from .triton import TritonBackend
from .triton.arrays import dense, ordered_like

OPERATORS = ("weight_norm", "forward_one", "backward_one", "forward", "backward")


class Operators:
    """The kernels of the operators. They are registered as long as this object exists."""

    def __init__(self, triton: TritonBackend, eager: EagerBackend) -> None:
        self._triton, self._eager = triton, eager
        self._libraries = []
        for device in triton.operator_devices:
            library = torch.library.Library("wnkernel", "IMPL", GPUS[device])
            for name in OPERATORS:
                library.impl(name, getattr(self, name))
            self._libraries.append(library)

    def weight_norm(self, *arguments: Any) -> Tensor:
        return self.forward_one(*arguments)[0]

    def forward_one(
        self,
        v: Tensor,
        g: Tensor,
        dim: int,
        eps: float = 0.0,
        out_dtype: torch.dtype | None = None,
        bucket: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        w, norm = self.forward([v], [g], [dim], [eps], out_dtype)
        return w, norm

    def backward_one(
        self,
        grad_w: Tensor,
        v: Tensor,
        g: Tensor,
        norm: Tensor,
        dim: int,
        eps: float,
        need_v: bool,
        need_g: bool,
        bucket: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        grads = self.backward([grad_w], [v], [g], [norm], [dim], [eps], [need_v], [need_g])
        return (
            grads[0] if need_v else v.new_empty(0),
            grads[-1] if need_g else g.new_empty(0),
        )

    def forward(
        self,
        v: Sequence[Tensor],
        g: Sequence[Tensor],
        dim: Sequence[int],
        eps: Sequence[float],
        out_dtype: torch.dtype | None = None,
    ) -> list[Tensor]:
        problems = check_forward(v, g, dim, eps, out_dtype, may_add=True)
        if self._triton.takes(v[0]):
            w, norm = self._triton.weights(problems, apart=True)
        else:
            w, norm = self._eager.weights([_without_gaps(p) for p in problems])
        return [*w, *norm]

    def backward(
        self,
        grad_w: Sequence[Tensor],
        v: Sequence[Tensor],
        g: Sequence[Tensor],
        norm: Sequence[Tensor],
        dim: Sequence[int],
        eps: Sequence[float],
        need_v: Sequence[int],
        need_g: Sequence[int],
    ) -> list[Tensor]:
        problems = check_backward(grad_w, v, g, norm, dim, eps, need_v, need_g)
        wanted = [bool(x) for x in need_v], [bool(x) for x in need_g]
        if self._triton.takes(v[0]):
            norm = [n.contiguous() for n in norm]
            grad_v, grad_g = self._triton.gradients(problems, norm, grad_w, *wanted, apart=True)
        else:
            problems = [_without_gaps(p) for p in problems]
            grad_v, grad_g = self._eager.gradients(problems, norm, grad_w, *wanted)
            grad_v = [
                None if t is None else ordered_like("grad_v", t, p.v)
                for t, p in zip(grad_v, problems, strict=True)
            ]
        return [t for t in (*grad_v, *grad_g) if t is not None]


def _without_gaps(p: Problem) -> Problem:
    """Make v dense, because results get the strides of v, and the fake kernels promise dense
    ones."""
    return replace(p, v=dense("v", p.v))
