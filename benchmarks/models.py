"""Case "models": whole models, each weight computed on its own, as the three kinds do it."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import verify
from .contenders import BY_CASE, COPY, TORCH, Checker, Pass, copy_of, random_grads, stripped
from .environment import Environment
from .model_zoo import BY_NAME, build, model_input
from .plan import Job, Plan
from .results import STEP, Result, of_list, rows
from .timing import Contender, device_sampler, measure

OUTPUT_L2 = 1e-4
"""Allowed relative difference of two outputs: float32 roundings through some tens of layers."""

LEARNING_RATE = 1e-6  # So small that the models stay the same while they are timed.


def jobs(plan: Plan, where: Environment) -> list[Job]:
    """One job per model."""
    names = plan.models or BY_NAME
    return [Job(f"model {name}", lambda n=name: freed(run(n, plan, where))) for name in names]


def freed(results: list[Result]) -> list[Result]:
    """Pass results on after the models that gave them are gone: modules sit in cycles, and what
    they hold would move the measurements that follow."""
    gc.collect()
    return results


def run(name: str, plan: Plan, where: Environment) -> list[Result]:
    """Verify, then time, the weight norms alone and a training step, all kinds interleaved."""
    normed = stripped(build(name, where.device))
    models = {who: normed(who) for who in BY_CASE["models"]}
    del normed
    vs = [layer.v for layer in models[TORCH].layers]
    about = of_list("models", name, [v.numel() for v in vs])
    grads = random_grads(vs)
    alone = {who: Pass(normed, grads) for who, normed in models.items()}
    checker = Checker(name, where)
    errors = {who: checker.check_pass(who, one) for who, one in alone.items()}
    del checker
    x = model_input(name, where.device)
    forward = BY_NAME[name].forward
    with torch.no_grad():
        want = forward(models[TORCH].model, x)
        for who, one in models.items():
            verify.check_same(f"{who}, {name}", forward(one.model, x), want, OUTPUT_L2)
    sample = device_sampler(where.device)

    timed: dict[str, Contender] = {**alone, COPY: copy_of(vs)}
    stats = measure(timed, sample, plan.model_budget_s)
    out = rows(about, where, stats, errors=errors)
    del timed, alone, grads

    steps = {
        who: training_step(one.model, functools.partial(forward, one.model, x))
        for who, one in models.items()
    }
    return out + rows(about.of_phase(STEP), where, measure(steps, sample, plan.step_budget_s))


def training_step(model: nn.Module, forward: Callable[[], Tensor]) -> Contender:
    """Forward, mean of squares, backward, SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

    def step() -> None:
        forward().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
