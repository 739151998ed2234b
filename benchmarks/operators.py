"""Case "operators": what one call of the operator costs on a weight too small to need a kernel.

A backward goes through autograd's engine, which takes most of its time whoever computes the
gradients. How much, the contender "engine" says: the same call on a node that computes nothing.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext

import torch
from torch import Tensor

import wnkernel

from .environment import Environment
from .layers import operators, subject, tensors, verified
from .plan import Job, Plan
from .results import OURS, TORCH, Result, rows
from .shapes import LayerCase
from .timing import Contender, host_sampler, measure

CASE = LayerCase((8, 8), 0, "64 elements", "Linear")
ENGINE = "engine"
"""What runs nodes, and no operator of anybody's."""

RECORDED = "call, recorded"
NO_GRAD = "call, no_grad"
BACKWARD = "backward alone"


def jobs(plan: Plan, where: Environment) -> list[Job]:
    """All calls are one job."""
    return [Job("operators", lambda: run(plan, where))]


def run(plan: Plan, where: Environment) -> list[Result]:
    """Verify, then time, a forward with and without autograd, and a backward."""
    t = tensors(CASE, torch.float32, where.device)
    errors = verified("operators", operators(CASE.dim), t, CASE.dim, where)
    forwards: dict[str, Contender] = {
        OURS: functools.partial(wnkernel.functional.weight_norm, t.v, t.g, CASE.dim),
        TORCH: functools.partial(torch._weight_norm, t.v, t.g, CASE.dim),
    }
    backwards = {who: _backward(call(), (t.v, t.g), t.grad_w) for who, call in forwards.items()}
    backwards[ENGINE] = _of_nothing(t.v, t.grad_w)
    out = []
    for phase, timed, context in (
        (RECORDED, forwards, nullcontext()),
        (NO_GRAD, forwards, torch.no_grad()),
        (BACKWARD, backwards, nullcontext()),
    ):
        with context:
            stats = measure(timed, host_sampler(where.device), plan.host_budget_s)
        about = subject(CASE, torch.float32, "operators", phase)
        out += rows(about, where, stats, errors=errors)
    return out


def _backward(w: Tensor, inputs: tuple[Tensor, Tensor], grad_w: Tensor) -> Contender:
    return functools.partial(torch.autograd.grad, w, inputs, grad_w, retain_graph=True)


def _of_nothing(v: Tensor, grad_w: Tensor) -> Contender:
    """Of a sum of two tensors: a node that hands what it gets on to two leaves, as it is."""
    other = torch.zeros_like(v).requires_grad_()
    return _backward(v + other, (v, other), grad_w)
