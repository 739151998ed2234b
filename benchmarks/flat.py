"""Case "flat": the same bytes in more and more layers. What grows is the cost of a layer."""

from __future__ import annotations

from .environment import Environment
from .fused import compare, subject
from .plan import Job, Plan
from .results import FUSED, OURS, TORCH, VERSION, Result
from .shapes import LayerCase

NUMEL = 2**21
"""8 MiB of v in float32."""

KERNEL = (128, 4)
"""Input channels and taps: rows of 512 elements, however many layers share them."""

CONTENDERS = (TORCH, OURS, FUSED, VERSION)


def jobs(plan: Plan, where: Environment) -> list[Job]:
    """One job per number of layers."""
    return [Job(f"flat, {n} layers", lambda n=n: run(n, plan, where)) for n in plan.flat_layers]


def run(layers: int, plan: Plan, where: Environment) -> list[Result]:
    """Verify, then time, ``layers`` equal layers."""
    rows_each = NUMEL // (KERNEL[0] * KERNEL[1] * layers)
    cases = [LayerCase((rows_each, *KERNEL), 0, "equal layers", "Conv1d")] * layers
    label = f"{NUMEL * 4 // 2**20} MiB in equal layers"
    about = subject("flat", label, cases)
    return compare(about, cases, CONTENDERS, plan.flat_budget_s, where)
