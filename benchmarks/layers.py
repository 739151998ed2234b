"""Case "layers": the weight norm of one weight, through autograd, at the level of the operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

import wnkernel

from . import verify
from .environment import Environment
from .plan import Job, Plan
from .results import (
    COPY,
    FORWARD,
    FORWARD_BACKWARD,
    OURS,
    READ,
    TORCH,
    Result,
    Subject,
    rows,
)
from .shapes import ADDED, LayerCase, grid, shape_text
from .timing import Contender, device_sampler, measure

Operator = Callable[[Tensor, Tensor], Tensor]

BF16_KINDS = ("first", "last")


def jobs(plan: Plan, where: Environment) -> list[Job]:
    """One job per dtype and weight of the grid."""
    cases = select(grid(), plan)
    work = [(c, torch.float32) for c in cases]
    work += [(c, torch.bfloat16) for c in cases if c.kind in BF16_KINDS]
    return [
        Job(f"layer {shape_text(c.shape)} dim {c.dim}", lambda c=c, d=d: run(c, d, plan, where))
        for c, d in work
    ]


def select(cases: Iterable[LayerCase], plan: Plan) -> list[LayerCase]:
    """The part of the grid that the plan asks for; of the scarce dims, all that are not too big."""
    small = [c for c in cases if plan.max_numel is None or c.numel <= plan.max_numel]
    first = [c for c in small if c.kind == "first" and c.label != ADDED]
    rest = [c for c in small if not (c.kind == "first" and c.label != ADDED)]
    return first[:: plan.every] + rest


@dataclass(frozen=True)
class Tensors:
    """The inputs of one case. g is no norm of v: an operator that returns v must not pass."""

    v: Tensor
    g: Tensor
    grad_w: Tensor


def tensors(case: LayerCase, dtype: torch.dtype, device: torch.device) -> Tensors:
    """Random inputs, the same for everyone and in every run."""
    random = torch.Generator().manual_seed(0)
    v, grad_w = (
        torch.randn(case.shape, generator=random).to(device, dtype).requires_grad_(leaf)
        for leaf in (True, False)
    )
    g = torch.rand(case.norm_shape, generator=random).add_(0.5).to(device, dtype)
    return Tensors(v, g.requires_grad_(), grad_w)


def operators(dim: int | None) -> dict[str, Operator]:
    """The contenders as functions of v and g."""
    torch_dim = -1 if dim is None else dim
    return {
        OURS: lambda v, g: wnkernel.functional.weight_norm(v, g, dim),
        TORCH: lambda v, g: torch._weight_norm(v, g, torch_dim),
    }


def forward_backward(operator: Operator, t: Tensors) -> Contender:
    """Forward and backward with a ready-made ``grad_w``; nothing but the weight norm runs."""
    inputs = (t.v, t.g)
    return lambda: torch.autograd.grad(operator(t.v, t.g), inputs, t.grad_w)


def forward(operator: Operator, t: Tensors) -> Contender:
    """Forward with autograd recording."""
    return lambda: operator(t.v, t.g)


def forward_and_reader(operator: Operator, t: Tensors) -> Contender:
    """Forward with autograd recording, and what reads w at once: its product with a vector, as a
    matrix of rows along dim 0. The product is not recorded."""
    rows, length = t.v.shape[0], t.v.numel() // t.v.shape[0]
    x = torch.randn(length, generator=torch.Generator().manual_seed(1)).to(t.v.device, t.v.dtype)
    return lambda: torch.mv(operator(t.v, t.g).detach().view(rows, length), x)


PHASES = {FORWARD_BACKWARD: forward_backward, FORWARD: forward, READ: forward_and_reader}
READ_DTYPES = (torch.float32,)
"""Of the weights that are read. (A run has no time for more.)"""


def copy(v: Tensor) -> Contender:
    """The yardstick: v's bytes into memory that is there already. (A fresh buffer would measure the
    page faults of malloc, several times the copy.)"""
    source = v.detach()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def verified(
    case: str, contenders: dict[str, Operator], t: Tensors, dim: int | None, where: Environment
) -> dict[str, float]:
    """Check every contender against float64; returns their errors."""
    want = verify.reference(t.v, t.g, dim, t.grad_w)
    errors = {}
    for name, operator in contenders.items():
        w = operator(t.v, t.g)
        got = (w, *torch.autograd.grad(w, (t.v, t.g), t.grad_w))
        long_sums = name != OURS or not where.own_kernels
        errors[name] = verify.check(f"{name}, {case}", got, want, long_sums=long_sums)
    return errors


def subject(case: LayerCase, dtype: torch.dtype, kind_of_case: str, phase: str) -> Subject:
    """How a single weight is described in the results."""
    return Subject(
        case=kind_of_case,
        label=case.label,
        phase=phase,
        dtype=dtype_text(dtype),
        shape=shape_text(case.shape),
        dim="none" if case.dim is None else str(case.dim),
        kind=case.kind,
        numel=case.numel,
        array_bytes=case.numel * dtype.itemsize,
    )


def dtype_text(dtype: torch.dtype) -> str:
    """torch.float32 as ``float32``."""
    return str(dtype).removeprefix("torch.")


def run(case: LayerCase, dtype: torch.dtype, plan: Plan, where: Environment) -> list[Result]:
    """Verify, then time, one weight."""
    t = tensors(case, dtype, where.device)
    contenders = operators(case.dim)
    name = f"{dtype_text(dtype)} {shape_text(case.shape)} dim {case.dim}"
    errors = verified(name, contenders, t, case.dim, where)
    out = []
    for phase, make in PHASES.items():
        if phase == READ and dtype not in READ_DTYPES:
            continue
        timed = {who: make(operator, t) for who, operator in contenders.items()}
        timed[COPY] = copy(t.v)
        stats = measure(timed, device_sampler(where.device), plan.layer_budget_s)
        out += rows(subject(case, dtype, "layers", phase), where, stats, errors=errors)
    return out
