"""Case "whole": all weight norms of a model, by torch, one by one and fused.

An iteration reads every weight and takes the gradients of all v and g. Wall time is measured from
call to call and includes the host. Device time is measured in two ways. One is a CUDA graph, in
which every launch of a list also copies its table of weights. The other is a stream whose host is
ahead, as in a training step that is bound by its convolutions. All contenders take turns in one
process, because on a GPU they do not share malloc's state.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Sequence

from ..contenders import BY_CASE, COPY, TORCH, Iteration, Pass, copy_of, random_grads, weights_model
from ..results import Result, of_list, rows
from ..shapes import LayerCase
from ..timing import Contender, blamed, host_sampler, measure
from ..verify import Checker
from .plan import GpuJob, Setting
from .single import captured
from .timing import Queued, calls_for, capture, measure_graphs, queue_sampler

WHOLE = "whole"
WALL = "wall time"
GRAPH = "device time, CUDA graph"
STREAM = "device time, stream"

QUEUE_S = 0.5e-3  # The device time of a turn. A longer one would fill the queue of launches.
ARRAYS = 5


def jobs(setting: Setting) -> list[GpuJob]:
    """Make one job per model."""
    return [
        GpuJob(f"whole {name}", functools.partial(run, name, cases, setting))
        for name, cases in setting.plan.models[setting.part].items()
    ]


def run(
    name: str, cases: Sequence[LayerCase], setting: Setting, without: Collection[str]
) -> Iterator[list[Result]]:
    """Verify, then time, one model. Yield the rows of each way of timing."""
    plan, where = setting.plan, setting.where
    about = of_list(WHOLE, name, [c.numel for c in cases])
    checker = Checker(name, where)
    vs = [layer.v for layer in weights_model(TORCH, cases, where.device).layers]
    grads, copied = random_grads(vs), copy_of(vs)
    passes: dict[str, Pass] = {}
    timed: dict[str, Contender] = {}
    errors: dict[str, float] = {}
    for who in (w for w in BY_CASE[WHOLE] if w not in without):
        with blamed(who):
            normed = weights_model(who, cases, where.device)
            timed[who] = iteration = Iteration(normed, grads)
            errors[who] = checker.check_pass(who, iteration)
            passes[who] = Pass(normed, grads)
    timed[COPY] = copied

    budget_s, to_rows = plan.model_budget_s, functools.partial(rows, errors=errors, arrays=ARRAYS)
    until_done = host_sampler(where.device, until_done=True)
    walls = measure(timed, until_done, budget_s, min_sample_s=plan.sample_s)
    yield to_rows(about.of_phase(WALL), where, walls)

    calls = calls_for(ARRAYS * about.array_bytes, plan.graph_s)
    graphs = {COPY: capture([copied], calls, where.device)}
    for who, one in passes.items():
        if graph := captured(who, name, [one], calls, setting):
            graphs[who] = graph
    stats = measure_graphs(graphs, where.device, budget_s, plan.sample_s)
    yield to_rows(about.of_phase(GRAPH), where, stats)

    all_of = {**passes, COPY: copied}
    queued = {who: Queued(run, walls[who].median_ms / 1e3) for who, run in all_of.items()}
    stats = measure(queued, queue_sampler(where.device), budget_s, min_sample_s=QUEUE_S)
    yield to_rows(about.of_phase(STREAM), where, stats)
