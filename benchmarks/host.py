"""Case "host": what one access of ``layer.weight`` costs on layers too small to need a kernel."""

from __future__ import annotations

import torch
from torch import nn

import wnkernel

from . import kinds, verify
from .environment import Environment
from .layers import select, subject, tensors
from .plan import Job, Plan
from .results import OURS, UNCHANGED, Result, rows
from .shapes import LayerCase, grid, shape_text
from .timing import host_sampler, measure

MAX_NUMEL = 20_000
GROUP_MEMBERS = 8
"""Layers of the group, of which one is read."""

L2 = 1e-5
"""Allowed relative error of a weight, in float32."""

LAYERS = {
    "Conv1d": nn.Conv1d,
    "ConvTranspose1d": nn.ConvTranspose1d,
    "Conv2d": nn.Conv2d,
    "Linear": nn.Linear,
}


def jobs(plan: Plan, where: Environment) -> list[Job]:
    """One job per small layer of the real models."""
    small = [c for c in select(grid(), plan) if c.numel < MAX_NUMEL and c.dim == 0]
    return [Job(f"host {shape_text(c.shape)}", lambda c=c: run(c, plan, where)) for c in small]


def layer(case: LayerCase, device: torch.device) -> nn.Module:
    """A layer whose weight has the case's shape."""
    a, b, *kernel = case.shape
    kind = LAYERS[case.layer]
    channels = (a, b) if case.layer == "ConvTranspose1d" else (b, a)
    return kind(*channels, *([tuple(kernel)] if kernel else []), bias=False, device=device)


def run(case: LayerCase, plan: Plan, where: Environment) -> list[Result]:
    """Time a read under grad, graph and all; the three kinds and a group side by side. (The legacy
    kind recomputes in a hook before the forward, so that hook is called.)"""
    normed = {kind: kinds.apply(kind, layer(case, where.device), case.dim) for kind in kinds.APPLY}
    members = [kinds.apply(OURS, layer(case, where.device), case.dim) for _ in range(GROUP_MEMBERS)]
    model = nn.ModuleList(member.module for member in members)
    group = wnkernel.fuse(model, reuse="version")
    normed[UNCHANGED] = members[0]
    inputs = tensors(case, torch.float32, where.device)
    want = verify.reference(inputs.v, inputs.g, case.dim, inputs.grad_w).w
    for n in normed.values():
        with torch.no_grad():
            n.v.copy_(inputs.v)
            n.g.copy_(inputs.g)
    with group.scope():  # as within a forward; the first read computes, the others find it
        for kind, n in normed.items():
            verify.check_same(f"{kind}, {shape_text(case.shape)}", n.weight(), want, L2)
        contenders = {kind: n.weight for kind, n in normed.items()}
        stats = measure(contenders, host_sampler(where.device), plan.host_budget_s)
    return rows(subject(case, torch.float32, "host", "weight access"), where, stats)
