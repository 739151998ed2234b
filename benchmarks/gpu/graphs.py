"""Device time without host time: calls captured into a CUDA graph, which is timed as a whole.

On a device without CUDA graphs (a dry run on a CPU) a loop takes the place of the graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..timing import (
    Contender,
    Stats,
    device_sampler,
    measure,
    no_garbage_collection,
)
from ..verify import VerificationError

SPEED = 4e12
"""Bytes per second of a fast card, to guess how many calls fill a graph."""

LAUNCH_S = 2e-6
LEAST_CALLS, MOST_CALLS = 4, 256

Call = Callable[[], Sequence[Tensor]]

SLOW_S = 20e-3
"""A contender whose graph would take longer than this gets fewer calls."""


def use_side_stream(device: torch.device) -> None:
    """Make another stream than the default one current, for good: only such a stream can be
    captured, and what autograd recorded on one stream it runs backward on the same."""
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))


@dataclass(frozen=True)
class Graph:
    """Some calls of one contender that run without the host."""

    run: Contender
    calls: int
    result: Sequence[Tensor]
    """What the last of the calls returned: tensors that every run fills anew."""


def calls_for(traffic: float, graph_s: float) -> int:
    """How many calls that move so many bytes fill a graph of ``graph_s`` seconds."""
    calls = graph_s / (traffic / SPEED + LAUNCH_S)
    return min(max(round(calls), LEAST_CALLS), MOST_CALLS)


def capture(runs: Sequence[Call], calls: int, device: torch.device) -> Graph:
    """Put about ``calls`` calls into a graph, ``runs`` in turn, each equally often.

    All are called twice before: what they compile or cache, they do outside the graph.
    """
    sample = device_sampler(device)
    for run in runs:
        run()
    once = min(sample(run, 1) for run in runs)
    turns = max(1, math.ceil(min(calls, SLOW_S / max(once, 1e-7)) / len(runs)))
    calls = turns * len(runs)
    if device.type != "cuda":
        return _loop(runs, calls)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    result: Sequence[Tensor] = ()
    with no_garbage_collection():  # what it frees would disturb the capture
        graph.capture_begin()  # not torch.cuda.graph, which collects and empties caches each time
        try:
            for k in range(calls):
                result = ()  # so that the next call finds its memory free
                result = runs[k % len(runs)]()
        except BaseException:
            with suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()
    return Graph(graph.replay, calls, result)


def _loop(runs: Sequence[Call], calls: int) -> Graph:
    order = [runs[k % len(runs)] for k in range(calls)]

    def run() -> None:
        for call in order:
            call()

    return Graph(run, calls, order[-1]())


def check_replay(title: str, graph: Graph, want: Sequence[Tensor]) -> None:
    """Whether a graph computes what the last of its calls gives outside of it, to the bit.

    Raises:
        VerificationError: it does not.
    """
    for t in graph.result:
        t.detach().fill_(float("nan"))
    graph.run()
    for have, should in zip(graph.result, want, strict=True):
        if not torch.equal(have, should):
            raise VerificationError(f"{title}: in a CUDA graph something else is computed")


def measure_graphs(
    graphs: Mapping[str, Graph], device: torch.device, budget_s: float, sample_s: float
) -> dict[str, Stats]:
    """:func:`~benchmarks.timing.measure` of graphs: the time of one call."""
    runs = {name: graph.run for name, graph in graphs.items()}
    stats = measure(runs, device_sampler(device), budget_s, min_sample_s=sample_s)
    return {name: _per_call(s, graphs[name].calls) for name, s in stats.items()}


def _per_call(s: Stats, calls: int) -> Stats:
    return replace(
        s,
        median_ms=s.median_ms / calls,
        p20_ms=s.p20_ms / calls,
        p80_ms=s.p80_ms / calls,
        faults=s.faults / calls,
    )
