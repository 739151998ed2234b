"""Autograd for the Python-only backends: one node for a list of weight norms.

The node keeps v, g and norm as attributes instead of using ``save_for_backward``, and this file
compares their versions. So the node may run backward any number of times, and activation
checkpointing, which counts saved tensors, does not see them. csrc/node.cpp is the twin for the
compiled operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter, or_
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_dynamo_compiling

from . import composed
from .backends.base import PythonBackend
from .forms import Problems, spread
from .observers import have_addresses, is_transformed
from .problem import accumulation_dtype, version_of

Grads = tuple[Sequence[Tensor | None], Sequence[Tensor | None]]
"""The gradients of all v and of all g; an entry is None if its gradient is not needed."""


def weight_norms(
    problems: Problems, backend: PythonBackend, forced: Sequence[float] | None = None
) -> list[Tensor]:
    """Compute ``w`` of every problem, differentiable through one autograd node. With ``forced``,
    each v is replaced first so that its norm is the one given, unless that is 0."""
    tensors = *problems.v, *problems.g
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return list(_Forward.apply(backend, problems, forced, *tensors))
    return _weights(problems, backend, forced)[0]


def _weights(
    problems: Problems, backend: PythonBackend, forced: Sequence[float] | None
) -> tuple[list[Tensor], Sequence[Tensor]]:
    return backend.weights(problems) if forced is None else backend.forced(problems, forced)


def norms(
    v: Tensor, compute: Callable[[Tensor], Tensor], weight_norm: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Return ``compute(v)`` in v's dtype; its derivative is computed by ``weight_norm(v, g)``."""
    return _Norms.apply(v, compute, weight_norm)


class _Forward(Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: PythonBackend,
        problems: Problems,
        forced: Sequence[float] | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        w, ctx.norms = _weights(problems, backend, forced)
        problems.settle()
        ctx.backend, ctx.problems = backend, problems
        ctx.versions = _versions_of(tensors)
        ctx.set_materialize_grads(False)
        need, n = ctx.needs_input_grad[3:], len(w)
        needs = list(map(or_, need[:n], need[n:]))
        if not all(needs):
            # The backward computes nothing for weights of which neither v nor g needs a gradient.
            frozen = (t for t, is_needed in zip(w, needs, strict=True) if not is_needed)
            ctx.mark_non_differentiable(*frozen)
        return tuple(w)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_ws: Sequence[Any] = grads
        n, need = len(grad_ws), ctx.needs_input_grad
        need_v, need_g = need[3 : 3 + n], need[3 + n :]
        live = [k for k in range(n) if grad_ws[k] is not None and (need_v[k] or need_g[k])]
        if not live:
            return (None,) * (3 + 2 * n)
        problems, norms, versions = ctx.problems, ctx.norms, ctx.versions
        if len(live) < n:
            problems = problems.at(live)
            columns = norms, grad_ws, need_v, need_g, versions[:n], versions[n:]
            norms, grad_ws, need_v, need_g, of_v, of_g = (
                [column[k] for k in live] for column in columns
            )
            versions = of_v + of_g
        inputs = *problems.v, *problems.g
        if any(t.layout != torch.strided for t in grad_ws):  # an embedding makes sparse ones
            grad_ws = [t if t.layout == torch.strided else t.to_dense() for t in grad_ws]
        in_graph = is_dynamo_compiling()  # compiled autograd has called _compiled_autograd_key
        if not in_graph and _versions_of(inputs) != versions:
            names = "v" * len(live) + "g" * len(live)
            for changed in zip(names, inputs, versions, strict=True):
                _check_version(*changed)
        is_followed = not in_graph and (
            torch.is_grad_enabled() or is_transformed((*grad_ws, *inputs))
        )
        first = _followed_derivative if is_followed else _derivative
        grad_v, grad_g = first(ctx.backend, problems, norms, grad_ws, need_v, need_g)
        return None, None, None, *spread(grad_v, live, n), *spread(grad_g, live, n)

    @staticmethod
    def _compiled_autograd_key(ctx: Any) -> Any:
        """Compiled autograd calls this before every backward. Its graphs do not compare versions,
        so v and g of every weight that requires grad are checked here, even if this backward gives
        them no gradient."""
        need, n, inputs = ctx.needs_input_grad[3:], len(ctx.problems), ctx.problems
        for k in range(n):
            if need[k] or need[n + k]:
                _check_version("v", inputs.v[k], ctx.versions[k])
                _check_version("g", inputs.g[k], ctx.versions[n + k])
        return Function._compiled_autograd_key(ctx)


def _derivative(
    backend: PythonBackend,
    problems: Problems,
    norms: Sequence[Tensor],
    grad_ws: Sequence[Tensor],
    need_v: Sequence[bool],
    need_g: Sequence[bool],
) -> Grads:
    """Compute the first derivative, with the kernels of the backend if they can take the
    gradients."""
    if not is_dynamo_compiling():
        if any(map(Tensor._is_zerotensor, grad_ws)):  # these zeros have no memory
            grad_ws = [t.clone() for t in grad_ws]
        if backend.is_traceable or have_addresses(grad_ws):
            return backend.gradients(problems, norms, grad_ws, need_v, need_g)
    # Dynamo before torch 2.7 iterates over lists only.
    grads = [composed.gradients(problems[k], norms[k], w) for k, w in enumerate(grad_ws)]
    return composed.wanted(grads, need_v, need_g)


def _followed_derivative(
    backend: PythonBackend,
    problems: Problems,
    norms: Sequence[Tensor],
    grad_ws: Sequence[Tensor],
    need_v: Sequence[bool],
    need_g: Sequence[bool],
) -> Grads:
    """Compute the first derivative by an operation that is differentiable itself."""
    columns = norms, need_v, need_g
    found = iter(_Backward.apply(backend, problems, *columns, *grad_ws, *problems.v, *problems.g))
    grad_v, grad_g = ([next(found) if needed else None for needed in need] for need in columns[1:])
    return grad_v, grad_g


class _Backward(Function):
    """The first derivative as an autograd node. It returns the needed grad_v, then the needed
    grad_g."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: PythonBackend,
        problems: Problems,
        norms: Sequence[Tensor],
        need_v: Sequence[bool],
        need_g: Sequence[bool],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        grad_ws = tensors[: len(problems)]
        ctx.problems, ctx.grad_ws = problems, grad_ws
        ctx.need_v, ctx.need_g = need_v, need_g
        ctx.versions = _versions_of(tensors)
        ctx.set_materialize_grads(False)
        grad_v, grad_g = _derivative(backend, problems, norms, grad_ws, need_v, need_g)
        return tuple(t for t in (*grad_v, *grad_g) if t is not None)

    @staticmethod
    def backward(ctx: Any, *ggs: Tensor | None) -> tuple[Tensor | None, ...]:
        n = len(ctx.problems)
        found = iter(ggs)
        gg_v = [next(found) if wanted else None for wanted in ctx.need_v]
        gg_g = [next(found) if wanted else None for wanted in ctx.need_g]
        out: list[Tensor | None] = [None] * (3 * n)
        for k, (p, grad_w) in enumerate(zip(ctx.problems, ctx.grad_ws, strict=True)):
            if gg_v[k] is None and gg_g[k] is None:
                continue
            for name, t, j in (("grad_w", grad_w, k), ("v", p.v, n + k), ("g", p.g, 2 * n + k)):
                _check_version(name, t, ctx.versions[j])
            out[k], out[n + k], out[2 * n + k] = composed.double_backward(
                p, grad_w, gg_v[k], gg_g[k]
            )
        return None, None, None, None, None, *out


class _Norms(Function):
    """The norms of v as an autograd node. With u = v / norm the derivative is
    ``grad_v = grad_norm * u``, which is a weight norm."""

    @staticmethod
    def forward(
        ctx: Any,
        v: Tensor,
        compute: Callable[[Tensor], Tensor],
        weight_norm: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        norm = compute(v)
        ctx.v, ctx.version, ctx.weight_norm = v, version_of(v), weight_norm
        ctx.is_zero = norm == 0
        return norm.to(v.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        _check_version("v", ctx.v, ctx.version)
        if grad.layout != torch.strided:
            grad = grad.to_dense()
        # A zero row has no direction; its gradient is 0, as in torch.
        v, g = torch.where(ctx.is_zero, 1.0, ctx.v), torch.where(ctx.is_zero, 0.0, grad)
        return ctx.weight_norm(v, g.to(accumulation_dtype(v.dtype))), None, None


def _versions_of(tensors: Sequence[Tensor]) -> list[int]:
    try:
        return list(map(attrgetter("_version"), tensors))
    except RuntimeError:  # an inference tensor has no version
        return list(map(version_of, tensors))


def _check_version(name: str, t: Tensor, expected: int) -> None:
    if version_of(t) != expected:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: {name} of shape {list(t.shape)} of a weight norm is at version "
            f"{t._version}; expected version {expected} instead"
        )
