"""Case "host": what a call costs the thread that makes it, whatever the device does meanwhile.

Weights under 20,000 elements: the device is done before the host has made the next call.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

import torch

from .. import host
from ..blame import blamed
from ..layers import forward, forward_backward, operators, subject, tensors, verified
from ..plan import DEFAULT
from ..results import Result, rows
from ..shapes import LayerCase, grid
from ..timing import host_sampler, measure
from .plan import GpuJob, Part, Setting, case_title

CASE = "host"
CALL = "call, forward"
CALL_BACKWARD = "call, forward+backward"
"""Of :func:`wnkernel.functional.weight_norm` and of ``torch._weight_norm``, with autograd."""

SAMPLE_S = 1e-3
"""Of calls: too few to fill the queue of launches."""


def jobs(setting: Setting) -> list[GpuJob]:
    """One job per weight: first of reads of ``layer.weight``, the others of calls."""
    plan, where = setting.plan, setting.where
    small = [c for c in grid() if c.numel < host.MAX_NUMEL and c.dim == 0][:: plan.host_every]
    access = replace(DEFAULT, host_budget_s=plan.host_budget_s)
    if setting.part is Part.KEY:
        return [
            GpuJob(
                f"host, layer.weight, {case_title(c)}",
                lambda without, c=c: [host.run(c, access, where, without)],
            )
            for c in small
        ]
    return [
        GpuJob(f"host, call, {case_title(c)}", lambda without, c=c: run(c, setting, without))
        for c in small
    ]


def run(case: LayerCase, setting: Setting, without: Collection[str]) -> Iterator[list[Result]]:
    """Verify, then time, calls: the rows of the forward, and of both.

    Raises:
        ContenderError: a contender fails, or is wrong.
    """
    where, budget = setting.where, setting.plan.host_budget_s
    t = tensors(case, torch.float32, where.device)
    contenders = {w: operator for w, operator in operators(case.dim).items() if w not in without}
    errors: dict[str, float] = {}
    for who, operator in contenders.items():
        with blamed(who):
            errors |= verified(case_title(case), {who: operator}, t, case.dim, where)
    for phase, make in ((CALL, forward), (CALL_BACKWARD, forward_backward)):
        timed = {who: make(operator, t) for who, operator in contenders.items()}
        stats = measure(timed, host_sampler(where.device), budget, min_sample_s=SAMPLE_S)
        yield rows(subject(case, torch.float32, CASE, phase), where, stats, errors=errors)
