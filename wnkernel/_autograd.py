"""Autograd for the Python-only backends: one node for a list of weight norms.

Nothing goes through ``save_for_backward``: v, g and norm are attributes of the node, and their
versions are compared here. So the node may run backward any number of times, and activation
checkpointing, which counts saved tensors, sees none of it. csrc/autograd.cpp is the twin for the
compiled operators.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import composed
from .backends.base import PythonBackend
from .problem import Problem, version_of


def weight_norms(problems: Sequence[Problem], backend: PythonBackend) -> list[Tensor]:
    """``w`` of every problem, differentiable through one node."""
    vs, gs = [p.v for p in problems], [p.g for p in problems]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*vs, *gs)):
        return list(_Forward.apply(backend, problems, *vs, *gs))
    return backend.forward(problems)[0]


def have_addresses(tensors: Iterable[Tensor]) -> bool:
    """Whether kernels may be given addresses: there is memory, and no mode or subclass (make_fx,
    fake tensors) that wants to see operators."""
    return torch._C._len_torch_dispatch_stack() == 0 and all(
        torch._C._has_storage(t) and not torch._C._dispatch_keys(t).has(torch._C.DispatchKey.Python)
        for t in tensors
    )


class _Forward(Function):
    @staticmethod
    def forward(
        ctx: Any, backend: PythonBackend, problems: Sequence[Problem], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        w, ctx.norms = backend.forward(problems)
        ctx.backend, ctx.problems = backend, problems
        ctx.versions = [version_of(t) for t in tensors]
        ctx.set_materialize_grads(False)
        # Nothing is to be computed for weights of which neither v nor g wants a gradient.
        ctx.mark_non_differentiable(
            *(
                frozen
                for p, frozen in zip(problems, w, strict=True)
                if not (p.v.requires_grad or p.g.requires_grad)
            )
        )
        return tuple(w)

    @staticmethod
    def backward(ctx: Any, *grad_ws: Tensor | None) -> tuple[Tensor | None, ...]:
        n = len(ctx.problems)
        need = ctx.needs_input_grad[2:]
        live = [k for k in range(n) if grad_ws[k] is not None and (need[k] or need[n + k])]
        problems = [ctx.problems[k] for k in live]
        for k, p in zip(live, problems, strict=True):
            _check_version("v", p.v, ctx.versions[k])
            _check_version("g", p.g, ctx.versions[n + k])
        need_v, need_g = [need[k] for k in live], [need[n + k] for k in live]
        grads = (
            _Backward.apply(
                ctx.backend,
                problems,
                [ctx.norms[k] for k in live],
                need_v,
                need_g,
                *(grad_ws[k] for k in live),
                *(p.v for p in problems),
                *(p.g for p in problems),
            )
            if live
            else ()
        )
        found = iter(grads)
        out: list[Tensor | None] = [None] * (2 * n)
        for k, wanted in zip(live, need_v, strict=True):
            out[k] = next(found) if wanted else None
        for k, wanted in zip(live, need_g, strict=True):
            out[n + k] = next(found) if wanted else None
        return None, None, *out


class _Backward(Function):
    """The first derivative as a differentiable operation: wanted grad_v, then wanted grad_g."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: PythonBackend,
        problems: Sequence[Problem],
        norms: Sequence[Tensor],
        need_v: Sequence[bool],
        need_g: Sequence[bool],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        grad_ws = tensors[: len(problems)]
        ctx.problems, ctx.grad_ws = problems, grad_ws
        ctx.need_v, ctx.need_g = need_v, need_g
        ctx.versions = [version_of(t) for t in tensors]
        ctx.set_materialize_grads(False)
        if backend.is_traceable or have_addresses(grad_ws):
            grad_v, grad_g = backend.backward(problems, norms, grad_ws, need_v, need_g)
        else:
            grads = map(composed.backward, problems, norms, grad_ws)
            grad_v, grad_g = composed.wanted(grads, need_v, need_g)
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


def _check_version(name: str, t: Tensor, expected: int) -> None:
    if version_of(t) != expected:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: {name} of shape {list(t.shape)} of a weight norm is at version "
            f"{t._version}; expected version {expected} instead"
        )
