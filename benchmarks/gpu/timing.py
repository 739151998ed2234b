"""Times on a GPU, measured in three ways: calls captured into a CUDA graph, which is timed as a
whole without the host; wall time until the device is done; calls that are queued while the device
waits.

On a device without CUDA graphs (a dry run on a CPU) a loop replaces the graph.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wnkernel.cli.timing import Times, no_garbage_collection

from ..timing import Contender, Sampler, device_sampler, measure
from ..verify import VerificationError

SPEED = 4e12  # Bytes per second of a fast card; tells how many calls fill a graph.
LAUNCH_S = 2e-6
LEAST_CALLS, MOST_CALLS = 4, 256
SLOW_S = 20e-3  # A contender whose graph would take longer than this gets fewer calls.
CYCLES_PER_S = 2e9  # The clock of ``torch.cuda._sleep`` has at most this.
HEADSTART = 1.5  # The device waits this many times as long as the host should need.
Call = Callable[[], Sequence[Tensor]]


def is_usable(device: torch.device) -> bool:
    """Free what was left on the device, and return whether it still works. After a fault, CUDA
    refuses everything until the process ends."""
    gc.collect()
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def use_side_stream(device: torch.device) -> None:
    """Make another stream than the default one current, permanently. Only such a stream can be
    captured, and autograd runs a backward on the stream that recorded it."""
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))


@dataclass(frozen=True)
class Graph:
    """Calls of one contender that run without the host."""

    run: Contender
    calls: int
    result: Sequence[Tensor]  # Of the last call: tensors that every run fills again.


def calls_for(traffic: float, graph_s: float) -> int:
    """Return how many calls that move so many bytes fill a graph of ``graph_s`` seconds."""
    calls = graph_s / (traffic / SPEED + LAUNCH_S)
    return min(max(round(calls), LEAST_CALLS), MOST_CALLS)


def capture(runs: Sequence[Call], calls: int, device: torch.device) -> Graph:
    """Put about ``calls`` calls into a graph. They take turns, and each of ``runs`` is equally
    frequent. All are called twice before, so that they compile and cache outside the graph."""
    for run in runs:
        run()
    once = min(device_sampler(device)(run, 1) for run in runs)
    turns = max(1, math.ceil(min(calls, SLOW_S / max(once, 1e-7)) / len(runs)))
    order = [*runs] * turns
    result: Sequence[Tensor] = ()
    if device.type != "cuda":

        def loop() -> None:
            for call in order:
                call()

        return Graph(loop, len(order), order[-1]())
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with no_garbage_collection():  # freeing memory would disturb the capture
        graph.capture_begin()  # torch.cuda.graph would collect garbage and empty caches each time
        try:
            for call in order:
                result = ()  # the next call finds this memory free
                result = call()
        except BaseException:
            with suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()
    return Graph(graph.replay, len(order), result)


def check_replay(title: str, graph: Graph, want: Sequence[Tensor]) -> None:
    """Check that a graph computes what its last call gives outside of it, to the bit."""
    for t in graph.result:
        t.detach().fill_(float("nan"))
    graph.run()
    for have, should in zip(graph.result, want, strict=True):
        if not torch.equal(have, should):
            raise VerificationError(f"{title}: in a CUDA graph something else is computed")


def measure_graphs(
    graphs: Mapping[str, Graph], device: torch.device, budget_s: float, sample_s: float
) -> dict[str, Times]:
    """Measure graphs by :func:`~benchmarks.timing.measure`: the time of one call."""
    runs = {who: graph.run for who, graph in graphs.items()}
    stats = measure(runs, device_sampler(device), budget_s, min_sample_s=sample_s)
    fields = ("median_ms", "p20_ms", "p80_ms", "faults")
    return {
        who: replace(t, **{name: getattr(t, name) / graphs[who].calls for name in fields})
        for who, t in stats.items()
    }


@dataclass(frozen=True)
class Queued:
    """A contender, and how long the host needs for one call of it."""

    run: Contender
    host_s: float

    def __call__(self) -> None:
        self.run()


def queue_sampler(device: torch.device) -> Sampler:
    """Return a sampler of the time that the device needs for :class:`Queued` calls when the host is
    ahead. The device first sleeps until all calls should be in the queue."""

    sample = device_sampler(device)

    def behind_a_sleep(queued: Contender, times: int) -> float:
        assert isinstance(queued, Queued)
        if device.type == "cuda":
            torch.cuda._sleep(int(CYCLES_PER_S * HEADSTART * queued.host_s * times))
        return sample(queued.run, times)

    return behind_a_sleep
