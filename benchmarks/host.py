"""Case "host": what one access of ``layer.weight`` costs on layers too small to need a kernel."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

import wnkernel

from . import kinds, verify
from .blame import blamed
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


def run(
    case: LayerCase, plan: Plan, where: Environment, without: Collection[str] = ()
) -> list[Result]:
    """Time a read under grad, graph and all; the three kinds and a group side by side, but for
    those that are to be left out. (The legacy kind recomputes in a hook before the forward, so that
    hook is called.)

    Raises:
        ContenderError: one of them gives wrong numbers, or fails.
    """
    inputs = tensors(case, torch.float32, where.device)
    want = verify.reference(inputs.v, inputs.g, case.dim, inputs.grad_w).w
    normed: dict[str, kinds.NormedLayer] = {}
    scope: AbstractContextManager[None] = nullcontext()
    for kind in (k for k in (*kinds.APPLY, UNCHANGED) if k not in without):
        with blamed(kind):
            if kind == UNCHANGED:
                normed[kind], scope = _member_of_a_group(case, where.device)
            else:
                normed[kind] = kinds.apply(kind, layer(case, where.device), case.dim)
            with torch.no_grad():
                normed[kind].v.copy_(inputs.v)
                normed[kind].g.copy_(inputs.g)
    with scope:  # as within a forward; the first read computes, the others find it
        for kind, n in normed.items():
            with blamed(kind):
                verify.check_same(f"{kind}, {shape_text(case.shape)}", n.weight(), want, L2)
        contenders = {kind: n.weight for kind, n in normed.items()}
        stats = measure(contenders, host_sampler(where.device), plan.host_budget_s)
    return rows(subject(case, torch.float32, "host", "weight access"), where, stats)


def _member_of_a_group(
    case: LayerCase, device: torch.device
) -> tuple[kinds.NormedLayer, AbstractContextManager[None]]:
    """A layer of a group, and what a forward is to it."""
    members = [kinds.apply(OURS, layer(case, device), case.dim) for _ in range(GROUP_MEMBERS)]
    model = nn.ModuleList(member.module for member in members)
    return members[0], _scope_of(model)


@contextmanager
def _scope_of(model: nn.Module) -> Iterator[None]:
    """Of a group, which lives as long as its model."""
    with wnkernel.fuse(model, reuse="version").scope():
        yield
