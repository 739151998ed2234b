"""Case "host": what a call costs the thread that makes it, whatever the device does meanwhile.

Weights under 20,000 elements: the device is done before the host has made the next call.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .. import host
from ..environment import Environment
from ..layers import forward, forward_backward, operators, subject, tensors, verified
from ..plan import DEFAULT, Job
from ..results import Result, rows
from ..shapes import LayerCase, grid
from ..timing import host_sampler, measure
from .plan import GpuPlan, case_title

CASE = "host"
CALL = "call, forward"
CALL_BACKWARD = "call, forward+backward"
"""Of :func:`wnkernel.functional.weight_norm` and of ``torch._weight_norm``, with autograd."""

SAMPLE_S = 1e-3
"""Of calls: too few to fill the queue of launches."""


def jobs(plan: GpuPlan, where: Environment) -> list[Job]:
    """One job per weight: calls of the function, and reads of ``layer.weight``."""
    small = [c for c in grid() if c.numel < host.MAX_NUMEL and c.dim == 0]
    access = replace(DEFAULT, host_budget_s=plan.host_budget_s)
    out = []
    for c in small[:: plan.host_every]:
        title = case_title(c)
        out.append(Job(f"host, call, {title}", lambda c=c: run(c, plan, where)))
        out.append(Job(f"host, layer.weight, {title}", lambda c=c: host.run(c, access, where)))
    return out


def run(case: LayerCase, plan: GpuPlan, where: Environment) -> list[Result]:
    """Verify, then time, calls on the automatic choice of backend."""
    t = tensors(case, torch.float32, where.device)
    contenders = operators(case.dim)
    errors = verified(case_title(case), contenders, t, case.dim, where)
    out = []
    for phase, make in ((CALL, forward), (CALL_BACKWARD, forward_backward)):
        timed = {who: make(operator, t) for who, operator in contenders.items()}
        sample = host_sampler(where.device)
        stats = measure(timed, sample, plan.host_budget_s, min_sample_s=SAMPLE_S)
        out += rows(subject(case, torch.float32, CASE, phase), where, stats, errors=errors)
    return out
