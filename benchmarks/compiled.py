"""Case "compile": torch.compile as a contender, on single weights and on all weights of one model.

Only the weight norm is compiled, with ``fullgraph``; a model's other operators would hide it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from . import kinds
from .environment import Environment
from .layers import copy, forward_backward, operators, subject, tensors, verified
from .models import Alone, alone_subject, build, check_alone, copy_all, freed
from .plan import Job, Plan
from .results import COMPILED, COPY, FORWARD_BACKWARD, OURS, TORCH, Result, rows
from .shapes import LayerCase, grid, shape_text
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

Report = Callable[[str], None]


def jobs(plan: Plan, where: Environment, model: str | None, report: Report) -> list[Job]:
    """One job per weight, and one for the model, if any."""
    by_key = {(c.shape, c.dim): c for c in grid()}
    cases = [by_key[key] for key in SHAPES[: plan.compile_layers]]
    out = [
        Job(
            f"compile {shape_text(c.shape)} dim {c.dim}",
            lambda c=c: _if_compilable(functools.partial(run_layer, c, plan, where), report),
        )
        for c in cases
    ]
    if model is not None:
        run = functools.partial(run_model, model, plan, where)
        out.append(Job(f"compile {model}", lambda: _if_compilable(run, report)))
    return out


def _if_compilable(run: Callable[[], list[Result]], report: Report) -> list[Result]:
    from torch._dynamo.exc import BackendCompilerFailed  # drags in the compiler's whole package

    try:
        return freed(run())
    except BackendCompilerFailed as error:  # no C++ compiler at run time, most often
        report(f"torch.compile skipped: {str(error).strip().splitlines()[0]}")
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
    """All weights of a model in one compiled function, beside the uncompiled reads."""
    torch._dynamo.reset()
    original = kinds.strip(build(name, where.device))
    grads = original.grads()
    timed: dict[str, Alone] = {}
    compile_s: dict[str, float] = {}
    errors: dict[str, float] = {}
    for kind in (OURS, TORCH):
        _, layers = original.with_kind(kind)
        timed[kind] = Alone(layers, grads)
        if kind == TORCH or plan.compile_model_ours:
            read = torch.compile(_reader(layers), fullgraph=True, dynamic=False)
            fast = Alone(layers, grads, read)
            start = time.perf_counter()
            fast()
            compile_s[kind + COMPILED] = time.perf_counter() - start
            timed[kind + COMPILED] = fast
    errors = check_alone(name, timed, where)
    about = alone_subject(name, "compile", timed[TORCH].layers)
    contenders = {**timed, COPY: copy_all(timed[TORCH].layers)}
    stats = measure(contenders, device_sampler(where.device), plan.model_budget_s)
    return rows(about, where, stats, errors=errors, compile_s=compile_s)


def _reader(layers: list[kinds.NormedLayer]) -> Callable[[], list[Tensor]]:
    modules = [layer.module for layer in layers]
    return lambda: [m.weight for m in modules]
