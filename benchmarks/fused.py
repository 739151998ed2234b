"""Case "fused": all weight norms of a model, one by one and in one launch, against torch's.

The weights of a model are taken from shapes.csv, as bare layers. Every contender has a process of
its own (see processes.py).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from .environment import Environment
from .grouped import GROUPINGS, Checker, Iteration, random_grads, weights_model
from .models import ALONE, copy_all
from .plan import Job, Plan
from .processes import measure_apart, run_apart
from .results import COPY, TORCH, Result, Subject, rows
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


def jobs(plan: Plan, where: Environment) -> list[Job]:
    """One job per model."""
    names = plan.fused_models or MODELS
    return [Job(f"fused {name}", lambda n=name: run(n, plan, where)) for name in names]


def run(name: str, plan: Plan, where: Environment) -> list[Result]:
    """Verify, then time, one model."""
    cases = weight_list(name)
    about = subject("fused", name, cases)
    return compare(about, cases, tuple(GROUPINGS), plan.fused_budget_s, where)


def compare(
    about: Subject,
    cases: Sequence[LayerCase],
    contenders: Sequence[str],
    budget_s: float,
    where: Environment,
) -> list[Result]:
    """Verify, then time, the weights of a list, beside a copy of all v."""
    errors = run_apart(functools.partial(_verify, about.label, contenders, cases, where), where)
    prepare = {who: functools.partial(_iteration, who, cases, where) for who in contenders}
    prepare[COPY] = functools.partial(_copy, cases, where)
    stats = measure_apart(prepare, where, budget_s)
    return rows(about, where, stats, errors=errors)


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


def _iteration(who: str, cases: Sequence[LayerCase], where: Environment) -> Iteration:
    model = weights_model(who, cases, where.device)
    return Iteration(model, random_grads([layer.v for layer in model.layers]))


def _verify(
    title: str, contenders: Sequence[str], cases: Sequence[LayerCase], where: Environment
) -> dict[str, float]:
    checker = Checker(title, where)
    return {who: checker.check_iteration(who, _iteration(who, cases, where)) for who in contenders}


def _copy(cases: Sequence[LayerCase], where: Environment) -> Contender:
    return copy_all(weights_model(TORCH, cases, where.device).layers)
