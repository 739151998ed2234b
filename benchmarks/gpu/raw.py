"""The contenders without autograd: what one forward and one backward launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from wnkernel.backends import BACKENDS
from wnkernel.backends.compiled import CompiledBackend
from wnkernel.problem import check

from ..layers import Tensors
from ..results import GROUPED, OURS, TORCH
from ..shapes import LayerCase

FALLBACK = "eager"
"""The backend that is torch's operators again."""


class Raw(NamedTuple):
    """Two calls on prepared tensors."""

    forward: Callable[[], tuple[Tensor, ...]]
    """Gives w, and what else its backward needs."""
    backward: Callable[[], tuple[Tensor, Tensor]]
    """Gives grad_v and grad_g."""


Maker = Callable[[Tensors, int | None], Raw]


def inputs(case: LayerCase, dtype: torch.dtype, device: torch.device, number: int) -> Tensors:
    """Random tensors, the same for everyone. g is no norm of v."""
    random = torch.Generator(device).manual_seed(number)
    v, grad_w = (
        torch.randn(case.shape, generator=random, device=device).to(dtype) for _ in range(2)
    )
    g = torch.rand(case.norm_shape, generator=random, device=device).add_(0.5).to(dtype)
    return Tensors(v, g, grad_w)


def backends(v: Tensor) -> list[str]:
    """Names of the backends with kernels of ours that can take ``v``, best first."""
    return [
        name
        for name, b in BACKENDS.items()
        if name != FALLBACK and b.is_automatic(v) and not b.reasons(v)
    ]


def ours(backend: str) -> str:
    """The name of a contender."""
    return f"{OURS} {backend}"


def makers(v: Tensor, backend: str) -> dict[str, Maker]:
    """Ours on a backend, if it runs, and torch."""
    kernels = {ours(backend): _of_backend(backend)} if backend in backends(v) else {}
    return {**kernels, TORCH: of_torch}


def is_ours(who: str) -> bool:
    """Whether a contender is this package."""
    return who.startswith(OURS) or who in GROUPED


def _of_backend(name: str) -> Maker:
    backend = BACKENDS[name]
    if isinstance(backend, CompiledBackend):
        return _of_operators

    def make(t: Tensors, dim: int | None) -> Raw:
        problems = [check(t.v, t.g, dim)]
        norms = backend.forward(problems)[1]

        def forward() -> tuple[Tensor, ...]:
            (w,), (norm,) = backend.forward(problems)
            return w, norm

        def backward() -> tuple[Tensor, Tensor]:
            (grad_v,), (grad_g,) = backend.backward(problems, norms, [t.grad_w], [True], [True])
            return grad_v, grad_g

        return Raw(forward, backward)

    return make


def _of_operators(t: Tensors, dim: int | None) -> Raw:
    ops = torch.ops.wnkernel
    p = check(t.v, t.g, dim)
    norm = ops.forward_one(t.v, t.g, p.dim, p.eps)[1]

    def forward() -> tuple[Tensor, ...]:
        return ops.forward_one(t.v, t.g, p.dim, p.eps)

    def backward() -> tuple[Tensor, Tensor]:
        return ops.backward_one(t.grad_w, t.v, t.g, norm, p.dim, p.eps, True, True)

    return Raw(forward, backward)


def of_torch(t: Tensors, dim: int | None) -> Raw:
    """``torch._weight_norm`` without autograd, and the backward that autograd would call: one
    kernel on the first and the last dim, a list of operators on the others."""
    torch_dim = -1 if dim is None else dim

    def forward() -> tuple[Tensor, ...]:
        return (torch._weight_norm(t.v, t.g, torch_dim),)

    if dim in (0, t.v.ndim - 1):
        norm = torch._weight_norm_interface(t.v, t.g, dim)[1]
        fused = torch.ops.aten._weight_norm_interface_backward
        return Raw(forward, lambda: fused(t.grad_w, t.v, t.g, norm, dim))
    v, g = t.v.detach().requires_grad_(), t.g.detach().requires_grad_()
    with torch.enable_grad():
        w = torch._weight_norm(v, g, torch_dim)
    return Raw(forward, lambda: torch.autograd.grad(w, (v, g), t.grad_w, retain_graph=True))
