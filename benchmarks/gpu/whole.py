"""Case "whole": all weight norms of a model, by torch, one by one and fused.

An iteration reads every weight and takes the gradients of all v and g. Wall time is measured from
call to call and has the host in it. Device time is measured twice: inside a CUDA graph, which takes
a copy of the table of weights with it wherever one is launched from, and in a stream whose host is
ahead, as in a training step that is bound by its convolutions. All contenders take turns in one
process, for on a GPU they do not share malloc's state.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..blame import ContenderError, blamed
from ..fused import subject
from ..grouped import Checker, Iteration, Normed, random_grads, weights_model
from ..models import copy_all
from ..results import COPY, FUSED, OURS, TORCH, Result, rows
from ..shapes import LayerCase
from ..timing import Contender, Stats, measure
from ..verify import VerificationError
from .device import is_usable
from .graphs import calls_for, capture, check_replay, measure_graphs
from .plan import GpuJob, Setting
from .raw import is_ours
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


def jobs(setting: Setting) -> list[GpuJob]:
    """One job per model."""
    return [
        GpuJob(f"whole {name}", lambda without, n=name, c=cases: run(n, c, setting, without))
        for name, cases in setting.plan.models[setting.part].items()
    ]


def run(
    name: str, cases: Sequence[LayerCase], setting: Setting, without: Collection[str]
) -> Iterator[list[Result]]:
    """Verify, then time, one model: the rows of one way of timing after the other.

    Raises:
        ContenderError: a contender fails, or is wrong.
    """
    plan, where = setting.plan, setting.where
    about = subject(CASE, name, cases)
    checker = Checker(name, where)
    bare = weights_model(TORCH, cases, where.device).layers
    grads = random_grads([layer.v for layer in bare])
    copied = copy_all(bare)
    passes: dict[str, Pass] = {}
    iterations: dict[str, Contender] = {}
    errors: dict[str, float] = {}
    for who in (w for w in CONTENDERS if w not in without):
        with blamed(who):
            model = weights_model(who, cases, where.device)
            iterations[who] = iteration = Iteration(model, grads)
            errors[who] = checker.check_iteration(who, iteration)
            passes[who] = Pass(model, grads)

    budget = plan.model_budget_s
    walls = measure(
        {**iterations, COPY: copied}, wall_sampler(where.device), budget, min_sample_s=plan.sample_s
    )
    yield rows(about.of_phase(WALL), where, walls, errors=errors, arrays=ARRAYS)

    stats = _graphs(name, passes, copied, ARRAYS * about.array_bytes, setting)
    yield rows(about.of_phase(GRAPH), where, stats, errors=errors, arrays=ARRAYS)

    queued = {who: Queued(p, walls[who].median_ms / 1e3) for who, p in passes.items()}
    queued[COPY] = Queued(copied, walls[COPY].median_ms / 1e3)
    stats = measure(queued, queue_sampler(where.device), budget, min_sample_s=QUEUE_S)
    yield rows(about.of_phase(STREAM), where, stats, errors=errors, arrays=ARRAYS)


def _graphs(
    name: str, passes: Mapping[str, Pass], copied: Contender, traffic: float, setting: Setting
) -> dict[str, Stats]:
    """Capture, check and time.

    Raises:
        ContenderError: ours computes something else when it is captured, or the device fails. Who
            cannot be captured is told and left out.
    """
    plan, device = setting.plan, setting.where.device
    calls = calls_for(traffic, plan.graph_s)
    graphs = {COPY: capture([copied], calls, device)}
    for who, one_pass in passes.items():
        try:
            with blamed(who):
                graphs[who] = capture([one_pass], calls, device)
                if is_ours(who) and device.type == "cuda":
                    check_replay(f"{who}, {name}", graphs[who], one_pass())
        except ContenderError as error:
            if isinstance(error.__cause__, VerificationError) or not is_usable(device):
                raise
            tell = setting.fail if is_ours(who) else setting.report
            tell(f"{who} cannot be captured into a CUDA graph, {name}: {error}")
            graphs.pop(who, None)
    return measure_graphs(graphs, device, plan.model_budget_s, plan.sample_s)


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
