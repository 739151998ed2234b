"""The contenders without autograd: what one forward and one backward launch, and the least bytes
that these have to move."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from wnkernel.backends import BACKENDS
from wnkernel.backends.base import Backend
from wnkernel.backends.compiled import CompiledBackend
from wnkernel.backends.triton.plan import VECTOR_BYTES, plan
from wnkernel.problem import Problem, canonical_dim, check, row_view

from ..contenders import OURS, OWN, TORCH
from ..layers import Tensors
from ..shapes import LayerCase
from .plan import REAL

FALLBACK = "eager"  # The backend that is torch's operators again.
FLAGGEMS, FLAGGEMS_PACKAGE = "FlagGems", "flag_gems"
FORWARD, BACKWARD = "forward", "backward"

ONE_PASS = {FORWARD: 2, BACKWARD: 3}
"""Arrays of v's size that are moved where a row (backward: of v and of grad_w) stays on the chip
between the reduction and the scaling: read v, write w; read v and grad_w, write grad_v. g and the
norms are small and not counted. For a copy, bytes read and bytes written both count."""

TWO_PASSES = {FORWARD: 3, BACKWARD: 5}

ROW_ON_CHIP = 8192
"""Elements of a contiguous row that a backend is believed to keep, if it does not say."""

MOST_LAUNCHES = 4  # Of a list: two forward, two backward.


class Raw(NamedTuple):
    """Two calls on prepared tensors."""

    forward: Callable[[], tuple[Tensor, ...]]  # Gives w, and what else its backward needs.
    backward: Callable[[], tuple[Tensor, Tensor]]  # Gives grad_v and grad_g.


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


def is_ours(who: str) -> bool:
    """Whether a contender is this package."""
    return who.startswith(OURS) or who in OWN


def makers(v: Tensor, backend: str) -> dict[str, Maker]:
    """Ours on a backend, if it runs, and torch."""
    kernels = {ours(backend): of_backend(backend)} if backend in backends(v) else {}
    return {**kernels, TORCH: of_torch}


def of_backend(name: str) -> Maker:
    """Ours on a backend."""
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
    ops, p = torch.ops.wnkernel, check(t.v, t.g, dim)
    norm = ops.forward_one(t.v, t.g, p.dim, p.eps)[1]
    return Raw(
        lambda: ops.forward_one(t.v, t.g, p.dim, p.eps),
        lambda: ops.backward_one(t.grad_w, t.v, t.g, norm, p.dim, p.eps, True, True),
    )


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


def flaggems() -> Maker:
    """FlagGems, for the first and the last dim.

    Raises:
        ImportError: it is not installed.
        AttributeError: it has not the functions of version 5.
    """
    if importlib.util.find_spec(FLAGGEMS_PACKAGE) is None:
        raise ImportError("not installed")
    package = importlib.import_module(FLAGGEMS_PACKAGE)
    forward, backward = package.weight_norm_interface, package.weight_norm_interface_backward

    def make(t: Tensors, dim: int | None) -> Raw:
        norm = forward(t.v, t.g, dim)[1]
        return Raw(lambda: forward(t.v, t.g, dim), lambda: backward(t.grad_w, t.v, t.g, norm, dim))

    return make


def arrays(phase: str, p: Problem, backend: Backend) -> int:
    """The traffic of a phase in arrays of v's size. A backend can say ``fits_on_chip(problem)``
    itself."""
    fits = getattr(backend, "fits_on_chip", lambda p: _is_short(p.v, p.dim))(p)
    return (ONE_PASS if fits else TWO_PASSES)[phase]


def _is_short(v: Tensor, dim: int) -> bool:
    """Whether the rows lie one after the other, short enough for a block to keep."""
    view = row_view(v, dim)
    return view.outer == 1 and view.inner <= ROW_ON_CHIP


def model_launches(name: str, backend: str) -> int:
    """Kernels of a fused model in float32; the most there can be, if the backend does not say."""

    def may_split(case: LayerCase) -> bool:
        v = torch.empty(case.shape, device="meta")
        dim = canonical_dim(case.dim, v.ndim)
        if backend != "triton":
            return backend != "cuda" or not _is_short(v, dim)
        view, size = row_view(v, dim), v.element_size()
        return plan(view.outer, view.rows, view.inner, size, VECTOR_BYTES // size).split > 1

    known = {n: cases for models in REAL.models.values() for n, cases in models.items()}
    most = name not in known or any(map(may_split, known[name]))
    return MOST_LAUNCHES if most else MOST_LAUNCHES // 2
