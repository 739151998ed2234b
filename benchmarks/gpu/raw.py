"""The contenders without autograd: the launches of one forward and one backward, and the least
bytes that these must move."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wnkernel.backends import BACKENDS
from wnkernel.backends.base import Backend
from wnkernel.backends.compiled import CompiledBackend
from wnkernel.backends.triton.plan import VECTOR_BYTES, plan
from wnkernel.problem import Problem, canonical_dim, check, row_view

from ..contenders import OURS, OWN, TORCH, operators
from ..layers import Tensors
from ..shapes import LayerCase
from .plan import REAL

FALLBACK = "eager"  # The backend that runs torch's operators.
FLAGGEMS, FLAGGEMS_PACKAGE = "FlagGems", "flag_gems"
FORWARD, BACKWARD = "forward", "backward"

# The number of arrays of v's size that move if a row (in a backward, of v and of grad_w) stays on
# the chip between the reduction and the scaling. A forward reads v and writes w; a backward reads v
# and grad_w and writes grad_v. g and the norms are not counted. For a copy both directions count.
ONE_PASS = {FORWARD: 2, BACKWARD: 3}
TWO_PASSES = {FORWARD: 3, BACKWARD: 5}
ROW_ON_CHIP = 8192  # Elements of the longest row that a backend keeps, if it does not say.
MOST_LAUNCHES = 4  # For a list: two forward, two backward.


class Raw(NamedTuple):
    """Two calls on prepared tensors."""

    forward: Callable[[], Sequence[Tensor]]  # Returns w, and what else its backward needs.
    backward: Callable[[], Sequence[Tensor]]  # Returns grad_v and grad_g.


Maker = Callable[[Tensors, int | None], Raw]


def inputs(case: LayerCase, dtype: torch.dtype, device: torch.device, number: int) -> Tensors:
    """Return random tensors, the same for every contender. g is not the norm of v."""
    random = torch.Generator(device).manual_seed(number)
    v, grad_w = (
        torch.randn(case.shape, generator=random, device=device).to(dtype) for _ in range(2)
    )
    g = torch.rand(case.norm_shape, generator=random, device=device).add_(0.5).to(dtype)
    return Tensors(v, g, grad_w)


def backends(v: Tensor) -> list[str]:
    """Return the names of the backends with kernels of ours that can take ``v``, best first."""
    return [
        name
        for name, b in BACKENDS.items()
        if name != FALLBACK and b.is_automatic(v) and not b.reasons(v)
    ]


def ours(backend: str) -> str:
    """Return the name of a contender."""
    return f"{OURS} {backend}"


def is_ours(who: str) -> bool:
    """Whether a contender is wnkernel."""
    return who.startswith(OURS) or who in OWN


def makers(v: Tensor, backend: str) -> dict[str, Maker]:
    """Return the makers of ours on a backend, if the backend runs, and of torch."""
    kernels = {ours(backend): of_backend(backend)} if backend in backends(v) else {}
    return {**kernels, TORCH: of_torch}


def of_backend(name: str) -> Maker:
    """Return the maker of our calls on a backend."""
    backend, ops = BACKENDS[name], torch.ops.wnkernel

    def of_operators(t: Tensors, dim: int | None) -> Raw:
        p = check(t.v, t.g, dim)
        norm = ops.forward_one(t.v, t.g, p.dim, p.eps)[1]
        return Raw(
            lambda: ops.forward_one(t.v, t.g, p.dim, p.eps),
            lambda: ops.backward_one(t.grad_w, t.v, t.g, norm, p.dim, p.eps, True, True),
        )

    def of_lists(t: Tensors, dim: int | None) -> Raw:
        problems = [check(t.v, t.g, dim)]
        norms = backend.weights(problems)[1]
        more = norms, [t.grad_w], [True], [True]
        return Raw(
            lambda: [x for (x,) in backend.weights(problems)],
            lambda: [x for (x,) in backend.gradients(problems, *more)],
        )

    return of_operators if isinstance(backend, CompiledBackend) else of_lists


def of_torch(t: Tensors, dim: int | None) -> Raw:
    """Return ``torch._weight_norm`` without autograd, and the backward that autograd would call.
    This is one kernel on the first and the last dim, and a list of operators on the others."""
    norm = operators(dim)[TORCH]
    if dim in (0, t.v.ndim - 1):
        norms = torch._weight_norm_interface(t.v, t.g, dim)[1]
        fused = torch.ops.aten._weight_norm_interface_backward
        return Raw(lambda: (norm(t.v, t.g),), lambda: fused(t.grad_w, t.v, t.g, norms, dim))
    inputs = t.v.detach().requires_grad_(), t.g.detach().requires_grad_()
    with torch.enable_grad():
        w = norm(*inputs)
    backward = functools.partial(torch.autograd.grad, w, inputs, t.grad_w, retain_graph=True)
    return Raw(lambda: (norm(t.v, t.g),), backward)


def flaggems() -> Maker:
    """Return the maker of FlagGems' calls, for the first and the last dim. Raises ImportError if it
    is not installed, AttributeError if it lacks the functions of version 5."""
    if importlib.util.find_spec(FLAGGEMS_PACKAGE) is None:
        raise ImportError("not installed")
    package = importlib.import_module(FLAGGEMS_PACKAGE)
    forward, backward = package.weight_norm_interface, package.weight_norm_interface_backward

    def make(t: Tensors, dim: int | None) -> Raw:
        norm = forward(t.v, t.g, dim)[1]
        return Raw(lambda: forward(t.v, t.g, dim), lambda: backward(t.grad_w, t.v, t.g, norm, dim))

    return make


def arrays(phase: str, p: Problem, backend: Backend) -> int:
    """Return the traffic of a phase in arrays of v's size. A backend may have ``fits_on_chip``."""
    fits = getattr(backend, "fits_on_chip", lambda p: _is_short(p.v, p.dim))(p)
    return (ONE_PASS if fits else TWO_PASSES)[phase]


def _is_short(v: Tensor, dim: int) -> bool:
    """Whether the rows are contiguous and short enough for a block to keep."""
    view = row_view(v, dim)
    return view.outer == 1 and view.inner <= ROW_ON_CHIP


def model_launches(name: str, backend: str) -> int:
    """Return how many kernels a fused model launches in float32; the most possible, if the
    backend does not say."""

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
