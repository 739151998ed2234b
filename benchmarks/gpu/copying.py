"""Case "copy": what the card can do. Its own copy bandwidth, and what a launch in a graph costs."""

from __future__ import annotations

import torch

from ..layers import copy
from ..results import COPY, Result, Subject, rows
from .graphs import calls_for, capture, measure_graphs
from .plan import GpuJob, Part, Setting

CASE = "copy"
LAUNCH = "launch"
"""The phase, and the contender, of a kernel with nothing to do."""

LAUNCH_CALLS = 200
WARM_UP_BUDGETS = 10
"""A card that was idle needs a moment to reach its clock."""


def jobs(setting: Setting) -> list[GpuJob]:
    """First of all the launch, and one job for each size."""
    if setting.part is not Part.KEY:
        return []
    sizes = [
        GpuJob(f"copy of {n / 2**20:.0f} MiB", lambda without, n=n: [run(n, setting)])
        for n in setting.plan.copy_bytes
    ]
    return [GpuJob("launch", lambda without: [run_launch(setting)]), *sizes]


def run(size: int, setting: Setting) -> list[Result]:
    """An in-place copy of a float32 tensor of so many bytes."""
    plan, where = setting.plan, setting.where
    source = torch.ones(size // 4, device=where.device)
    graph = capture([copy(source)], calls_for(2 * size, plan.graph_s), where.device)
    budget = WARM_UP_BUDGETS * plan.weight_budget_s[Part.REST]
    stats = measure_graphs({COPY: graph}, where.device, budget, plan.sample_s)
    return rows(_subject(COPY, source), where, stats, arrays=2)


def run_launch(setting: Setting) -> list[Result]:
    """One element added to, over and over."""
    plan, where = setting.plan, setting.where
    one = torch.zeros(1, device=where.device)
    graph = capture([lambda: one.add_(1.0)], LAUNCH_CALLS, where.device)
    budget = plan.weight_budget_s[Part.REST]
    stats = measure_graphs({LAUNCH: graph}, where.device, budget, plan.sample_s)
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
