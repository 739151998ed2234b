"""``torch.ops.wnkernel`` on GPUs that ``wnkernel._C`` has no kernels for: Triton's, behind the same
schemas and the same autograd in C++. That is what torch.compile and torch.export put into their
graphs there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _ops
from ..problem import check, check_grad_w
from .base import PythonBackend
from .eager import EagerBackend
from .triton import TritonBackend

_KEYS = {"cuda": "CUDA", "xpu": "XPU"}


class Operators:
    """Kernels of the three operators, for as long as this lives."""

    def __init__(self, triton: TritonBackend, eager: EagerBackend) -> None:
        self._triton, self._eager = triton, eager
        self._devices = [d for d in _KEYS if _ops.loaded() and d not in _ops.BUILD_INFO["devices"]]
        self._libraries = []
        for device in self._devices:
            library = torch.library.Library("wnkernel", "IMPL", _KEYS[device])
            for kernel in (self.weight_norm, self.forward, self.backward):
                library.impl(kernel.__name__, kernel)
            self._libraries.append(library)

    def are_on(self, device: torch.device) -> bool:
        """Whether they are the kernels for tensors on ``device``."""
        return device.type in self._devices

    def weight_norm(
        self, v: Tensor, g: Tensor, dim: int, eps: float = 0.0, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        return self.forward([v], [g], [dim], [eps], out_dtype)[0][0]

    def forward(
        self,
        v: Sequence[Tensor],
        g: Sequence[Tensor],
        dim: Sequence[int],
        eps: Sequence[float],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        problems = [check(*weight, out_dtype) for weight in zip(v, g, dim, eps, strict=True)]
        return self._backend(v).forward(problems)

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
    ) -> tuple[list[Tensor], list[Tensor]]:
        problems = [check(*weight) for weight in zip(v, g, dim, eps, strict=True)]
        for grad, p in zip(grad_w, problems, strict=True):
            check_grad_w(grad, p)
        wanted = [bool(x) for x in need_v], [bool(x) for x in need_g]
        grad_v, grad_g = self._backend(v).backward(problems, norm, grad_w, *wanted)
        return [t for t in grad_v if t is not None], [t for t in grad_g if t is not None]

    def _backend(self, v: Sequence[Tensor]) -> PythonBackend:
        return self._eager if not v or self._triton.reasons(v[0]) else self._triton
