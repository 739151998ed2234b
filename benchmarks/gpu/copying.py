"""Case "copy": what the card can do. Its own copy bandwidth, and what a launch in a graph costs."""

from __future__ import annotations

import torch

from ..environment import Environment
from ..layers import copy
from ..plan import Job
from ..results import COPY, Result, Subject, rows
from .graphs import calls_for, capture, measure_graphs
from .plan import GpuPlan

CASE = "copy"
LAUNCH = "launch"
"""The phase, and the contender, of a kernel with nothing to do."""

LAUNCH_CALLS = 200
WARM_UP_BUDGETS = 10
"""A card that was idle needs a moment to reach its clock."""


def jobs(plan: GpuPlan, where: Environment) -> list[Job]:
    """One job for each size, and one for the launch."""
    sizes = [
        Job(f"copy of {n / 2**20:.0f} MiB", lambda n=n: run(n, plan, where))
        for n in plan.copy_bytes
    ]
    return [*sizes, Job("launch", lambda: run_launch(plan, where))]


def run(size: int, plan: GpuPlan, where: Environment) -> list[Result]:
    """An in-place copy of a float32 tensor of so many bytes."""
    source = torch.ones(size // 4, device=where.device)
    graph = capture([copy(source)], calls_for(2 * size, plan.graph_s), where.device)
    budget = WARM_UP_BUDGETS * plan.weight_budget_s
    stats = measure_graphs({COPY: graph}, where.device, budget, plan.sample_s)
    return rows(_subject(COPY, source), where, stats, arrays=2)


def run_launch(plan: GpuPlan, where: Environment) -> list[Result]:
    """One element added to, over and over."""
    one = torch.zeros(1, device=where.device)
    graph = capture([lambda: one.add_(1.0)], LAUNCH_CALLS, where.device)
    stats = measure_graphs({LAUNCH: graph}, where.device, plan.weight_budget_s, plan.sample_s)
    return rows(_subject(LAUNCH, one), where, stats)


def _subject(phase: str, t: torch.Tensor) -> Subject:
    return Subject(
        case=CASE,
        label="",
        phase=phase,
        dtype="float32",
        shape=str(t.numel()),
        dim="",
        kind="",
        numel=t.numel(),
        array_bytes=4 * t.numel(),
    )
