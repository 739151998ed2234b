"""Case "compile": torch.compile as a contender, on single weights and on all weights of a model,
on one thread and on all.

Only the weight norm is compiled, with ``fullgraph``; a model's other operators would hide it. How
much of a training step that is, is measured on whole models, beside the same models with folded
weights.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

import wnkernel

from . import fused, kinds, verify
from .environment import Environment
from .layers import copy, forward_backward, operators, subject, tensors, verified
from .model_zoo import BY_NAME, available, build, model_input
from .models import OUTPUT_L2, STEP, Forward, alone_subject, freed, training_step
from .plan import Job, Plan
from .results import (
    COMPILED,
    COPY,
    FORWARD_BACKWARD,
    FUSED,
    LEGACY,
    OURS,
    PLAIN,
    TORCH,
    Result,
    rows,
)
from .shapes import LayerCase, grid, shape_text, weight_list
from .timing import device_sampler, measure

SHAPES = (
    ((512, 512, 3), 0),
    ((768, 48, 128), 2),
    ((512, 512, 3, 3), 1),
    ((512, 512, 3), None),
    ((64, 64, 3), 0),
    ((512, 256, 16), 0),
    ((4096, 4096), None),
)
"""A taste of every memory pattern; the first few in a default run, for each has to be compiled."""

CONTENDERS = (
    TORCH,
    TORCH + COMPILED,
    LEGACY,
    OURS,
    FUSED,
    OURS + COMPILED,
    FUSED + COMPILED,
)
"""On all weights of a model."""

IN_STEPS = (TORCH, OURS, FUSED, PLAIN)
"""In a training step, each eager and compiled."""

FAILED = "torch._inductor.exc.InductorError"
"""What a traceback says where a compiler fails: there is none for C++ at run time, most often."""

Report = Callable[[str], None]


def jobs(plan: Plan, where: Environment, report: Report) -> list[Job]:
    """One job per weight, one per model and number of threads, one per model that is trained."""
    by_key = {(c.shape, c.dim): c for c in grid()}
    cases = [by_key[key] for key in SHAPES[: plan.compile_layers]]
    out = [
        Job(
            f"compile {shape_text(c.shape)} dim {c.dim}",
            lambda c=c: _if_compilable(functools.partial(run_layer, c, plan, where), report),
        )
        for c in cases
    ]
    for name in plan.compile_models:
        for threads in sorted({1, where.threads}):
            run = functools.partial(run_model, name, plan, replace(where, threads=threads))
            title = f"compile {name}, threads: {threads}"
            out.append(Job(title, lambda run=run: _if_compilable(run, report)))
    if plan.compile_steps and not available():
        report("Training step with torch.compile skipped: transformers is not installed.")
        return out
    for name in plan.compile_steps:
        run = functools.partial(run_steps, name, plan, where)
        out.append(Job(f"compile {name}, {STEP}", lambda run=run: _if_compilable(run, report)))
    return out


def _if_compilable(run: Callable[[], list[Result]], report: Report) -> list[Result]:
    from torch._dynamo.exc import BackendCompilerFailed  # drags in the compiler's whole package

    try:
        return freed(run())
    except RuntimeError as error:  # of a process of its own, a traceback
        lines = [x for x in str(error).strip().splitlines() if FAILED in x]
        if not lines and not isinstance(error, BackendCompilerFailed):
            raise
        report(f"torch.compile skipped: {(lines or str(error).strip().splitlines())[0]}")
        return []
    finally:
        torch._dynamo.reset()


def run_layer(case: LayerCase, plan: Plan, where: Environment) -> list[Result]:
    """One weight: eager and compiled, ours and torch's, in the same rounds."""
    torch._dynamo.reset()
    t = tensors(case, torch.float32, where.device)
    contenders = operators(case.dim)
    name = f"float32 {shape_text(case.shape)} dim {case.dim}"
    compile_s = {}
    for who, operator in list(contenders.items()):
        fast = torch.compile(operator, fullgraph=True, dynamic=False)
        start = time.perf_counter()
        forward_backward(fast, t)()
        compile_s[who + COMPILED] = time.perf_counter() - start
        contenders[who + COMPILED] = fast
    errors = verified(name, contenders, t, case.dim, where)
    timed = {who: forward_backward(operator, t) for who, operator in contenders.items()}
    timed[COPY] = copy(t.v)
    stats = measure(timed, device_sampler(where.device), plan.compile_budget_s)
    about = subject(case, torch.float32, "compile", FORWARD_BACKWARD)
    return rows(about, where, stats, errors=errors, compile_s=compile_s)


def run_model(name: str, plan: Plan, where: Environment) -> list[Result]:
    """All weights of a model, computed in all ways, each in a process of its own."""
    cases = weight_list(name)
    label = f"{name}, {where.threads} thread{'s' if where.threads > 1 else ''}"
    about = fused.subject("compile", label, cases)
    return fused.compare(about, cases, CONTENDERS, plan.compile_model_budget_s, where)


def run_steps(name: str, plan: Plan, where: Environment) -> list[Result]:
    """Training steps of a whole model, whose forward is eager or one graph, in the same rounds."""
    torch._dynamo.reset()
    original = kinds.strip(build(name, where.device))
    x = model_input(name, where.device)
    forwards, steps, parameters = {}, {}, {}
    for who in IN_STEPS:
        for how in ("", COMPILED):
            model, layers = original.with_kind(TORCH if who == TORCH else OURS)
            if who == FUSED:
                wnkernel.fuse(model)
            if who == PLAIN:
                wnkernel.fold(model)
                named = {"grad_w": [n.module.weight for n in layers]}
            else:
                named = {"grad_v": [n.v for n in layers], "grad_g": [n.g for n in layers]}
            parameters[who + how] = named
            forward = functools.partial(BY_NAME[name].forward, model)
            if how:
                forward = torch.compile(forward, fullgraph=True, dynamic=False)
            forwards[who + how] = forward
            steps[who + how] = training_step(model, forward, x)
    _check_steps(name, forwards, parameters, x)
    stats = measure(steps, device_sampler(where.device), plan.step_budget_s)
    about = alone_subject(name, "compile", layers, phase=STEP)
    return rows(about, where, stats)


def _check_steps(
    name: str,
    forwards: Mapping[str, Forward],
    parameters: Mapping[str, Mapping[str, list[nn.Parameter]]],
    x: Tensor,
) -> None:
    """Check the output and the gradients of every model against those of the first that has such,
    with the graphs that are timed: without gradients a compiler would make others.

    Args:
        name: of the model, for messages.
        forwards: the models.
        parameters: of each, by the names of their gradients.
        x: their input.

    Raises:
        VerificationError: outside the tolerance.
    """
    first: dict[str, Tensor] = {}
    for who, forward in forwards.items():
        output = forward(x)
        inputs = [p for some in parameters[who].values() for p in some]
        grads = iter(torch.autograd.grad(output.square().mean(), inputs))
        found = {"output": output.detach()}
        for what, some in parameters[who].items():
            found[what] = torch.cat([next(grads).flatten() for _ in some])
        for what, got in found.items():
            want = first.setdefault(what, got)
            verify.check_same(f"{who}, {name}", got, want, OUTPUT_L2, what)
