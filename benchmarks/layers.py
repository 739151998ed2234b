"""One weight: cases "layers" (through autograd), "operators" (a call with 64 elements) and "host"
(a read of ``layer.weight`` on layers so small that no kernel matters)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

import wnkernel
from wnkernel.cli.timing import Times

from . import verify
from .contenders import BY_CASE, COPY, ENGINE, OURS, TORCH, UNCHANGED, apply, copy_of, operators
from .environment import Environment
from .plan import Job, Plan
from .results import FORWARD, FORWARD_BACKWARD, READ, Result, of_weight, rows
from .shapes import ADDED, LayerCase, dtype_text, grid
from .timing import Contender, blamed, device_sampler, host_sampler, measure

Operator = Callable[[Tensor, Tensor], Tensor]
BF16_KINDS = ("first", "last")
CALLED = LayerCase((8, 8), 0, "64 elements", "Linear")
# Phases of CALLED. autograd's engine takes most of the time of a backward in every contender. The
# contender "engine" shows it: the same call on a node without work.
RECORDED, NO_GRAD, BACKWARD = "call, recorded", "call, no_grad", "backward alone"
MAX_NUMEL = 20_000  # The largest layer for which no kernel matters.
GROUP_MEMBERS = 8  # The layers of the group, one of which is read.
L2 = 1e-5  # The allowed relative error of a weight, in float32.


def jobs(plan: Plan, where: Environment) -> list[Job]:
    """Make one job per dtype and weight of the grid."""
    cases = select(grid(), plan)
    work = [(c, torch.float32) for c in cases]
    work += [(c, torch.bfloat16) for c in cases if c.kind in BF16_KINDS]
    return [Job(f"layer {c}", functools.partial(run, c, d, plan, where)) for c, d in work]


def operator_jobs(plan: Plan, where: Environment) -> list[Job]:
    """Make one job of all calls."""
    return [Job("operators", functools.partial(run_calls, plan, where))]


def host_jobs(plan: Plan, where: Environment) -> list[Job]:
    """Make one job per small layer of the real models."""
    small = [c for c in select(grid(), plan) if c.numel < MAX_NUMEL and c.dim == 0]
    run = functools.partial(run_host, budget_s=plan.host_budget_s, where=where)
    return [Job(f"host {c}", functools.partial(run, c)) for c in small]


def select(cases: Iterable[LayerCase], plan: Plan) -> list[LayerCase]:
    """Return the part of the grid that the plan asks for. Weights with scarce dims are all included
    if they are small enough."""
    small = [c for c in cases if plan.max_numel is None or c.numel <= plan.max_numel]
    first = [c for c in small if c.kind == "first" and c.label != ADDED]
    return first[:: plan.every] + [c for c in small if c not in first]


class Tensors(NamedTuple):
    """The inputs of one case. g is not the norm of v, so that an operator that returns v fails."""

    v: Tensor
    g: Tensor
    grad_w: Tensor


def tensors(case: LayerCase, dtype: torch.dtype, device: torch.device) -> Tensors:
    """Return random inputs, the same for every contender and in every run."""
    random = torch.Generator().manual_seed(0)
    v, grad_w = (
        torch.randn(case.shape, generator=random).to(device, dtype).requires_grad_(leaf)
        for leaf in (True, False)
    )
    g = torch.rand(case.norm_shape, generator=random).add_(0.5).to(device, dtype)
    return Tensors(v, g.requires_grad_(), grad_w)


def forward_backward(operator: Operator, t: Tensors) -> Contender:
    """Return a contender with a ready ``grad_w``, so that only the weight norm runs."""
    return lambda: torch.autograd.grad(operator(t.v, t.g), (t.v, t.g), t.grad_w)


def forward(operator: Operator, t: Tensors) -> Contender:
    """Return a contender that runs the forward while autograd records."""
    return lambda: operator(t.v, t.g)


def forward_and_reader(operator: Operator, t: Tensors) -> Contender:
    """Return a contender that runs the forward while autograd records, and then multiplies w, as a
    matrix of rows along dim 0, with a vector, which autograd does not record."""
    rows, length = t.v.shape[0], t.v.numel() // t.v.shape[0]
    x = torch.randn(length, generator=torch.Generator().manual_seed(1)).to(t.v.device, t.v.dtype)
    return lambda: torch.mv(operator(t.v, t.g).detach().view(rows, length), x)


PHASES = {FORWARD_BACKWARD: forward_backward, FORWARD: forward, READ: forward_and_reader}


def verified(
    title: str, contenders: Mapping[str, Operator], t: Tensors, dim: int | None, where: Environment
) -> dict[str, float]:
    """Check every contender against float64; return their errors."""
    want = verify.reference(t.v, t.g, dim, t.grad_w)
    errors = {}
    for who, operator in contenders.items():
        with blamed(who):
            w = operator(t.v, t.g)
            got = (w, *torch.autograd.grad(w, (t.v, t.g), t.grad_w))
            long_sums = who != OURS or not where.own_kernels
            errors[who] = verify.check(f"{who}, {title}", got, want, long_sums=long_sums)
    return errors


def run(case: LayerCase, dtype: torch.dtype, plan: Plan, where: Environment) -> list[Result]:
    """Verify, then time, one weight."""
    t = tensors(case, dtype, where.device)
    contenders = operators(case.dim)
    errors = verified(f"{dtype_text(dtype)} {case}", contenders, t, case.dim, where)
    out = []
    for phase in PHASES:
        if phase != READ or dtype == torch.float32:  # A run has no time for more.
            stats = beside_a_copy(phase, contenders, t, plan.layer_budget_s, where)
            out += rows(of_weight(case, dtype, "layers", phase), where, stats, errors=errors)
    return out


def beside_a_copy(
    phase: str, contenders: Mapping[str, Operator], t: Tensors, budget_s: float, where: Environment
) -> dict[str, Times]:
    """Return the times of all contenders, and of a copy of v."""
    timed = {who: PHASES[phase](operator, t) for who, operator in contenders.items()}
    timed[COPY] = copy_of([t.v])
    return measure(timed, device_sampler(where.device), budget_s)


def run_calls(plan: Plan, where: Environment) -> list[Result]:
    """Verify, then time, a forward with and without autograd, and a backward."""
    t = tensors(CALLED, torch.float32, where.device)
    errors = verified("operators", operators(CALLED.dim), t, CALLED.dim, where)
    ours, torchs = wnkernel.functional.weight_norm, torch._weight_norm
    forwards: dict[str, Contender] = {
        who: functools.partial(f, t.v, t.g, CALLED.dim)
        for who, f in ((OURS, ours), (TORCH, torchs))
    }
    backwards = {who: _backward(call(), (t.v, t.g), t.grad_w) for who, call in forwards.items()}
    backwards[ENGINE] = of_nothing(t.v, t.grad_w)
    out = []
    for phase, timed, context in (
        (RECORDED, forwards, nullcontext()),
        (NO_GRAD, forwards, torch.no_grad()),
        (BACKWARD, backwards, nullcontext()),
    ):
        with context:
            stats = measure(timed, host_sampler(where.device), plan.host_budget_s)
        about = of_weight(CALLED, torch.float32, "operators", phase)
        out += rows(about, where, stats, errors=errors)
    return out


def _backward(w: Tensor, inputs: tuple[Tensor, Tensor], grad_w: Tensor) -> Contender:
    return functools.partial(torch.autograd.grad, w, inputs, grad_w, retain_graph=True)


def of_nothing(v: Tensor, grad_w: Tensor) -> Contender:
    """Return the backward of a sum of two tensors: one node passes its gradient to two leaves."""
    other = torch.zeros_like(v).requires_grad_()
    return _backward(v + other, (v, other), grad_w)


def run_host(
    case: LayerCase, budget_s: float, where: Environment, without: Collection[str] = ()
) -> list[Result]:
    """Time a read with grad mode on, including the graph: the three kinds and a group side by side,
    except those in ``without``. (The legacy kind computes in a hook, so that hook is called.)"""
    inputs = tensors(case, torch.float32, where.device)
    want = verify.reference(inputs.v, inputs.g, case.dim, inputs.grad_w).w
    timed: dict[str, Contender] = {}
    scope: AbstractContextManager[None] = nullcontext()
    for who in (w for w in BY_CASE["host"] if w not in without):
        with blamed(who):
            count = GROUP_MEMBERS if who == UNCHANGED else 1
            layers = [apply(who, _layer(case, where.device), case.dim) for _ in range(count)]
            timed[who] = layers[0].weight
            if who == UNCHANGED:
                model = nn.ModuleList(layer.module for layer in layers)
                scope = wnkernel.fuse(model, reuse="version").scope()
            with torch.no_grad():
                layers[0].v.copy_(inputs.v)
                layers[0].g.copy_(inputs.g)
    with scope:  # as in a forward: the first read computes, later reads find w
        for who, read in timed.items():
            with blamed(who):
                verify.check_same(f"{who}, {case}", read(), want, L2)
        stats = measure(timed, host_sampler(where.device), budget_s)
    return rows(of_weight(case, torch.float32, "host", "weight access"), where, stats)


def _layer(case: LayerCase, device: torch.device) -> nn.Module:
    """Return a layer whose weight has the case's shape."""
    a, b, *kernel = case.shape
    channels = (a, b) if case.layer == "ConvTranspose1d" else (b, a)
    of_kernel = [tuple(kernel)] if kernel else []
    return getattr(nn, case.layer)(*channels, *of_kernel, bias=False, device=device)
