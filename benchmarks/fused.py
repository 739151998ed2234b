"""Case "fused": all weight norms of a model, one by one and in one launch, against torch's.

The weights of a model are taken from shapes.csv, as bare layers. Every contender has a process of
its own (see processes.py).
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Sequence
from tempfile import TemporaryDirectory

import torch

from .environment import Environment
from .grouped import GROUPINGS, Checker, Iteration, random_grads, weights_model
from .models import ALONE, copy_all
from .plan import Job, Plan
from .processes import measure_apart, run_apart
from .results import COPY, FUSED, OURS, TORCH, UNCHANGED, VERSION, Result, Subject, rows
from .shapes import LayerCase, weight_list
from .timing import Contender

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
CONTENDERS = (TORCH, OURS, FUSED, VERSION, UNCHANGED)


def jobs(plan: Plan, where: Environment) -> list[Job]:
    """One job per model."""
    names = plan.fused_models or MODELS
    return [Job(f"fused {name}", lambda n=name: run(n, plan, where)) for name in names]


def run(name: str, plan: Plan, where: Environment) -> list[Result]:
    """Verify, then time, one model."""
    cases = weight_list(name)
    about = subject("fused", name, cases)
    return compare(about, cases, CONTENDERS, plan.fused_budget_s, where)


def compare(
    about: Subject,
    cases: Sequence[LayerCase],
    contenders: Sequence[str],
    budget_s: float,
    where: Environment,
) -> list[Result]:
    """Verify, then time, the weights of a list, beside a copy of all v.

    What the verification compiles, in an empty cache, the processes that are timed take from it.
    """
    with TemporaryDirectory() as cache:
        verify = functools.partial(_verify, about.label, contenders, cases, where, cache)
        errors, compile_s = run_apart(verify, where)
        prepare = {w: functools.partial(_iteration, w, cases, where, cache) for w in contenders}
        prepare[COPY] = functools.partial(_copy, cases, where)
        stats = measure_apart(prepare, where, budget_s)
    return rows(about, where, stats, errors=errors, compile_s=compile_s)


def subject(case: str, label: str, cases: Sequence[LayerCase]) -> Subject:
    """How a list of weights is described in the results."""
    numel = sum(c.numel for c in cases)
    return Subject(
        case=case,
        label=label,
        phase=ALONE,
        dtype="float32",
        shape=f"{len(cases)} layer{'s' if len(cases) > 1 else ''}",
        dim="",
        kind="",
        numel=numel,
        array_bytes=4 * numel,
    )


def _iteration(who: str, cases: Sequence[LayerCase], where: Environment, cache: str) -> Iteration:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    model = weights_model(who, cases, where.device)
    return Iteration(model, random_grads([layer.v for layer in model.layers]))


def _verify(
    title: str,
    contenders: Sequence[str],
    cases: Sequence[LayerCase],
    where: Environment,
    cache: str,
) -> tuple[dict[str, float], dict[str, float]]:
    """The errors, and the seconds of the first calls of what is compiled."""
    checker = Checker(title, where)
    errors, compile_s = {}, {}
    for who in contenders:
        iteration = _iteration(who, cases, where, cache)
        if GROUPINGS[who].compiled:
            if not compile_s:
                _load_compiler(where)
            start = time.perf_counter()
            iteration()
            compile_s[who] = time.perf_counter() - start
        errors[who] = checker.check_iteration(who, iteration)
    return errors, compile_s


def _load_compiler(where: Environment) -> None:
    """Import the compiler and let it make what it needs for the first graph of any kind: that takes
    ten seconds, whoever comes first."""
    x = torch.ones(2, device=where.device, requires_grad=True)
    torch.compile(lambda: (2 * x).sum())().backward()


def _copy(cases: Sequence[LayerCase], where: Environment) -> Contender:
    return copy_all(weights_model(TORCH, cases, where.device).layers)
