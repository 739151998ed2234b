"""Cases "fused" and "flat": all weight norms of a model as bare layers, one by one and in one
launch, against torch's. "fused" takes the models of shapes.csv. "flat" spreads the same bytes over
more and more layers, so that the cost per layer shows. Every contender has a process of its own
(see processes.py)."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from tempfile import TemporaryDirectory

import torch

from .contenders import BY_CASE, COPY, TORCH, Iteration, copy_of, random_grads, weights_model
from .environment import Environment
from .plan import Job, Plan
from .processes import measure_apart, run_apart
from .results import Result, of_list, rows
from .shapes import LayerCase, weight_list
from .timing import Contender
from .verify import Checker

MODELS = (
    "SpeechT5HifiGan",
    "HiFi-GAN-V1",
    "UnivNet",
    "VITS",
    "DAC",
    "HiFi-GAN-MPD",
    "EnCodec-24k",
    "ParallelWaveGAN",
)

FLAT_NUMEL = 2**21  # 8 MiB of v in float32.
FLAT_ROW = (128, 4)  # Input channels and taps, however many layers share the rows.


def jobs(plan: Plan, where: Environment) -> list[Job]:
    """Make one job per model."""
    names = plan.fused_models or MODELS
    run = functools.partial(compare, "fused", budget_s=plan.fused_budget_s, where=where)
    return [Job(f"fused {n}", functools.partial(run, n, weight_list(n))) for n in names]


def flat_jobs(plan: Plan, where: Environment) -> list[Job]:
    """Make one job per number of layers."""
    label = f"{FLAT_NUMEL * 4 // 2**20} MiB in equal layers"
    found = []
    for n in plan.flat_layers:
        rows_each = FLAT_NUMEL // (FLAT_ROW[0] * FLAT_ROW[1] * n)
        cases = [LayerCase((rows_each, *FLAT_ROW), 0, "equal layers", "Conv1d")] * n
        run = functools.partial(compare, "flat", label, cases, plan.flat_budget_s, where)
        found.append(Job(f"flat, {n} layers", run))
    return found


def compare(
    case: str, label: str, cases: Sequence[LayerCase], budget_s: float, where: Environment
) -> list[Result]:
    """Verify, then time, the weights of a list, beside a copy of all v. The verification compiles
    into an empty cache, from which the timed processes load."""
    timed = (*BY_CASE[case], COPY)
    with TemporaryDirectory() as cache:
        make = functools.partial(_contender, cases=cases, where=where, cache=cache)
        verify = functools.partial(_verify, label, BY_CASE[case], make, where)
        errors, compile_s = run_apart(verify, where)
        stats = measure_apart({w: functools.partial(make, w) for w in timed}, where, budget_s)
    about = of_list(case, label, [c.numel for c in cases])
    return rows(about, where, stats, errors=errors, compile_s=compile_s)


def _contender(who: str, cases: Sequence[LayerCase], where: Environment, cache: str) -> Contender:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    normed = weights_model(TORCH if who == COPY else who, cases, where.device)
    vs = [layer.v for layer in normed.layers]
    return copy_of(vs) if who == COPY else Iteration(normed, random_grads(vs))


def _verify(
    title: str, contenders: Sequence[str], make: Callable[[str], Iteration], where: Environment
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the errors, and the seconds of the first calls of compiled contenders."""
    checker = Checker(title, where)
    errors, compile_s = {}, {}
    for who in contenders:
        iteration = make(who)
        if iteration.normed.way.compiled:
            if not compile_s:  # A first graph takes ten seconds, which must count for nobody.
                x = torch.ones(2, device=where.device, requires_grad=True)
                torch.compile(lambda x=x: (2 * x).sum())().backward()
            start = time.perf_counter()
            iteration()
            compile_s[who] = time.perf_counter() - start
        errors[who] = checker.check_pass(who, iteration)
    return errors, compile_s
