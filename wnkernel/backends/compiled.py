"""The backends behind ``wnkernel._C``: one class, an instance per device type it was built for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _ops
from ..problem import Problem


class CompiledBackend:
    """``torch.ops.wnkernel`` on one device type."""

    def __init__(self, name: str) -> None:
        self.name = name

    def missing(self) -> list[str]:
        if not _ops.loaded():
            return [_ops.load_error()]
        if self.name not in _ops.BUILD_INFO["devices"]:
            return [f"wnkernel._C was built without {self.name} kernels"]
        return []

    def reasons(self, v: Tensor, g: Tensor) -> list[str]:
        found = self.missing()
        if v.device.type != self.name:
            found.append(f"v is on {v.device}, its kernels run on {self.name}")
        return found

    def forward(self, problems: Sequence[Problem]) -> tuple[list[Tensor], list[Tensor]]:
        return torch.ops.wnkernel.forward(
            [p.v for p in problems],
            [p.g for p in problems],
            [p.dim for p in problems],
            [p.eps for p in problems],
            [p.out_dtype for p in problems],
        )

    def backward(
        self,
        problems: Sequence[Problem],
        norms: Sequence[Tensor],
        grad_ws: Sequence[Tensor],
        need_v: Sequence[bool],
        need_g: Sequence[bool],
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        grad_v, grad_g = torch.ops.wnkernel.backward(
            list(grad_ws),
            [p.v for p in problems],
            [p.g for p in problems],
            list(norms),
            [p.dim for p in problems],
            [p.eps for p in problems],
            list(need_v),
            list(need_g),
        )
        found_v, found_g = iter(grad_v), iter(grad_g)
        return (
            [next(found_v) if need else None for need in need_v],
            [next(found_g) if need else None for need in need_g],
        )
