"""Case "whole": all weight norms of a model, by torch, one by one and fused.

An iteration reads every weight and takes the gradients of all v and g. Wall time is measured from
call to call and has the host in it. Device time is measured twice: inside a CUDA graph, which takes
a copy of the table of weights with it wherever one is launched from, and in a stream whose host is
ahead, as in a training step that is bound by its convolutions. All contenders take turns in one
process, for on a GPU they do not share malloc's state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..environment import Environment
from ..fused import subject
from ..grouped import Checker, Iteration, Normed, random_grads, weights_model
from ..models import copy_all, freed
from ..plan import Job
from ..results import COPY, FUSED, OURS, TORCH, Result, rows
from ..shapes import LayerCase
from ..timing import Contender, Stats, measure
from .graphs import calls_for, capture, check_replay, measure_graphs
from .plan import GpuPlan
from .samplers import Queued, queue_sampler, wall_sampler

CASE = "whole"
WALL = "wall time"
GRAPH = "device time, CUDA graph"
STREAM = "device time, stream"

QUEUE_S = 0.5e-3
"""Of device time in a turn: more, and the queue of launches would be full before the device is
let go."""

CONTENDERS = (TORCH, OURS, FUSED)
ARRAYS = 5

Report = Callable[[str], None]


def jobs(plan: GpuPlan, where: Environment, report: Report) -> list[Job]:
    """One job per model."""
    return [
        Job(f"whole {name}", lambda n=name, c=cases: freed(run(n, c, plan, where, report)))
        for name, cases in plan.models.items()
    ]


def run(
    name: str, cases: Sequence[LayerCase], plan: GpuPlan, where: Environment, report: Report
) -> list[Result]:
    """Verify, then time, one model."""
    about = subject(CASE, name, cases)
    checker = Checker(name, where)
    models = {who: weights_model(who, cases, where.device) for who in CONTENDERS}
    grads = random_grads([layer.v for layer in models[TORCH].layers])
    iterations = {who: Iteration(model, grads) for who, model in models.items()}
    errors = {who: checker.check_iteration(who, i) for who, i in iterations.items()}
    copied = copy_all(models[TORCH].layers)

    timed = {**iterations, COPY: copied}
    budget = plan.model_budget_s
    stats_of_wall = measure(timed, wall_sampler(where.device), budget, min_sample_s=plan.sample_s)
    out = rows(about.of_phase(WALL), where, stats_of_wall, errors=errors, arrays=ARRAYS)

    passes = {who: Pass(model, grads) for who, model in models.items()}
    try:
        stats = _graphs(name, passes, copied, ARRAYS * about.array_bytes, plan, where)
        out += rows(about.of_phase(GRAPH), where, stats, errors=errors, arrays=ARRAYS)
    except RuntimeError as error:
        report(f"{name} cannot be captured into a CUDA graph: {str(error).splitlines()[0]}")

    queued = {who: Queued(p, stats_of_wall[who].median_ms / 1e3) for who, p in passes.items()}
    queued[COPY] = Queued(copied, stats_of_wall[COPY].median_ms / 1e3)
    stats = measure(queued, queue_sampler(where.device), budget, min_sample_s=QUEUE_S)
    return out + rows(about.of_phase(STREAM), where, stats, errors=errors, arrays=ARRAYS)


def _graphs(
    name: str,
    passes: Mapping[str, Pass],
    copied: Contender,
    traffic: float,
    plan: GpuPlan,
    where: Environment,
) -> dict[str, Stats]:
    """Capture, check and time.

    Raises:
        RuntimeError: something cannot be captured.
        VerificationError: ours computes something else when it is captured.
    """
    calls = calls_for(traffic, plan.graph_s)
    graphs = {who: capture([p], calls, where.device) for who, p in passes.items()}
    if where.device.type == "cuda":
        for who in (OURS, FUSED):
            check_replay(f"{who}, {name}", graphs[who], passes[who]())
    graphs[COPY] = capture([copied], calls, where.device)
    return measure_graphs(graphs, where.device, plan.model_budget_s, plan.sample_s)


class Pass:
    """An iteration that leaves nothing to launch but weight norms: no loss, no ``.grad``."""

    def __init__(self, model: Normed, grads: list[Tensor]) -> None:
        self._model, self._grads = model, grads
        self._modules = [layer.module for layer in model.layers]
        self._inputs = [p for layer in model.layers for p in (layer.v, layer.g)]

    def __call__(self) -> tuple[Tensor, ...]:
        with self._model.scope():
            weights = [module.weight for module in self._modules]
        return (*weights, *torch.autograd.grad(weights, self._inputs, self._grads))
