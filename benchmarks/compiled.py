"""Case "compile": torch.compile as a contender on single weights and on all weights of a model, on
one thread and on all.

Only the weight norm is compiled, with ``fullgraph``, because a model's other operators would hide
it. Training steps of whole models show the share of the weight norm; the same models with folded
weights run beside them.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from . import fused, verify
from .contenders import BY_CASE, COMPILED, OURS, Normed, operators, stripped
from .environment import Environment
from .layers import beside_a_copy, forward_backward, tensors, verified
from .models import BY_NAME, OUTPUT_L2, available, build, freed, model_input, training_step
from .plan import Job, Plan
from .results import FORWARD_BACKWARD, STEP, Result, of_list, of_weight, rows
from .shapes import LayerCase, grid, weight_list
from .timing import device_sampler, measure

# Samples of every memory pattern. A default run takes the first few, because each must be compiled.
SHAPES = (
    ((512, 512, 3), 0),
    ((768, 48, 128), 2),
    ((512, 512, 3, 3), 1),
    ((512, 512, 3), None),
    ((64, 64, 3), 0),
    ((512, 256, 16), 0),
    ((4096, 4096), None),
)
# A traceback contains this if a compiler fails; mostly no C++ compiler is installed at run time.
FAILED = "torch._inductor.exc.InductorError"
Report = Callable[[str], None]


def jobs(plan: Plan, where: Environment, report: Report) -> list[Job]:
    """Make a job per weight, one per model and number of threads, and one per model to train."""
    found = []

    def add(title: str, run: Callable[..., list[Result]], *args: object) -> None:
        job = functools.partial(_if_compilable, functools.partial(run, *args), report)
        found.append(Job(f"compile {title}", job))

    by_key = {(c.shape, c.dim): c for c in grid()}
    for case in (by_key[key] for key in SHAPES[: plan.compile_layers]):
        add(f"{case}", run_layer, case, plan, where)
    for name, threads in product(plan.compile_models, sorted({1, where.threads})):
        add(f"{name}, threads: {threads}", run_model, name, plan, replace(where, threads=threads))
    if plan.compile_steps and not available():
        report("Training step with torch.compile skipped: transformers is not installed.")
        return found
    for name in plan.compile_steps:
        add(f"{name}, {STEP}", run_steps, name, plan, where)
    return found


def _if_compilable(run: Callable[[], list[Result]], report: Report) -> list[Result]:
    try:
        with reported(report):
            return freed(run())
        return []
    finally:
        torch._dynamo.reset()


@contextmanager
def reported(report: Report) -> Iterator[None]:
    """Report that a compiler failed inside this context, and go on behind it."""
    from torch._dynamo.exc import BackendCompilerFailed  # it imports the compiler's whole package

    try:
        yield
    except RuntimeError as error:  # from a process of its own it is a traceback
        lines = [x for x in str(error).strip().splitlines() if FAILED in x]
        if not lines and not isinstance(error, BackendCompilerFailed):
            raise
        report(f"torch.compile skipped: {(lines or str(error).strip().splitlines())[0]}")


def run_layer(case: LayerCase, plan: Plan, where: Environment) -> list[Result]:
    """Time one weight: ours and torch's, eager and compiled, in the same rounds."""
    torch._dynamo.reset()
    t = tensors(case, torch.float32, where.device)
    contenders = operators(case.dim)
    compile_s = {}
    for who, operator in list(contenders.items()):
        fast = torch.compile(operator, fullgraph=True, dynamic=False)
        start = time.perf_counter()
        forward_backward(fast, t)()
        compile_s[who + COMPILED] = time.perf_counter() - start
        contenders[who + COMPILED] = fast
    errors = verified(f"float32 {case}", contenders, t, case.dim, where)
    stats = beside_a_copy(FORWARD_BACKWARD, contenders, t, plan.compile_budget_s, where)
    about = of_weight(case, torch.float32, "compile", FORWARD_BACKWARD)
    return rows(about, where, stats, errors=errors, compile_s=compile_s)


def run_model(name: str, plan: Plan, where: Environment) -> list[Result]:
    """Time all weights of a model in every way, each way in a process of its own."""
    label = f"{name}, {where.threads} thread{'s' if where.threads > 1 else ''}"
    budget_s = plan.compile_model_budget_s
    return fused.compare("compile", label, weight_list(name), budget_s, where)


def run_steps(name: str, plan: Plan, where: Environment) -> list[Result]:
    """Time training steps of a model with an eager or compiled forward, in the same rounds."""
    torch._dynamo.reset()
    original = stripped(build(name, where.device))
    x = model_input(name, where.device)
    models: dict[str, Normed] = {}
    forwards, steps = {}, {}
    for who in (one + how for one in BY_CASE["steps"] for how in ("", COMPILED)):
        models[who] = normed = original(who.removesuffix(COMPILED))
        forward = functools.partial(BY_NAME[name].forward, normed.model, x)
        if who.endswith(COMPILED):
            forward = torch.compile(forward, fullgraph=True, dynamic=False)
        forwards[who] = forward
        steps[who] = training_step(normed.model, forward)
    _check_steps(name, forwards, models)
    stats = measure(steps, device_sampler(where.device), plan.step_budget_s)
    numels = [layer.v.numel() for layer in models[OURS].layers]
    return rows(of_list("compile", name, numels, STEP), where, stats)


def _check_steps(
    name: str, forwards: Mapping[str, Callable[[], Tensor]], models: Mapping[str, Normed]
) -> None:
    """Check the output and the gradients of every model against those of the first model that has
    gradients. It uses the graphs that are timed: without gradients a compiler would make others."""
    first: dict[str, Tensor] = {}
    for who, forward in forwards.items():
        output = forward()
        grads = torch.autograd.grad(output.square().mean(), models[who].parameters)
        folded = models[who].way.folded
        parts = {"grad_w": grads} if folded else {"grad_v": grads[::2], "grad_g": grads[1::2]}
        found = {what: torch.cat([t.flatten() for t in some]) for what, some in parts.items()}
        found = {"output": output.detach(), **found}
        for what, got in found.items():
            want = first.setdefault(what, got)
            verify.check_same(f"{who}, {name}", got, want, OUTPUT_L2, what)
