"""How the GPU benchmark takes times: graphs, samplers, and a CUDA that only remembers calls."""

from __future__ import annotations

import gc
import itertools
import time

import pytest
import torch

from benchmarks.gpu import timing
from benchmarks.timing import host_sampler
from benchmarks.verify import VerificationError

from ..on_the_cpu import on_the_cpu

__all__ = ["on_the_cpu"]

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def tick(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    """The host's."""
    fake = Clock()
    monkeypatch.setattr(time, "perf_counter", fake)
    return fake


class FakeCuda:
    """What happened, in order. Its clock is the host's."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.slept = 0
        self.capturing = False


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = time.perf_counter()

        def synchronize(self):
            fake.calls.append("wait")

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    class CUDAGraph:
        def capture_begin(self):
            fake.capturing = True
            fake.calls.append("begin")

        def capture_end(self):
            fake.capturing = False
            fake.calls.append("end")
            if "bad" in fake.calls:
                raise RuntimeError("the capture was invalidated")

        def replay(self):
            fake.calls.append("replay")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: fake.calls.append("sync"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda n: setattr(fake, "slept", fake.slept + n))
    return fake


def test_calls_of_a_graph():
    assert timing.calls_for(2e9, 1e-3) == timing.LEAST_CALLS
    assert timing.calls_for(0, 1.0) == timing.MOST_CALLS
    assert 50 <= timing.calls_for(6e7, 1e-3) <= 70  # 15 µs of traffic and a launch


def test_a_graph_runs_every_set_of_tensors_equally_often():
    counts = [0, 0, 0]

    def call(k):
        counts[k] += 1
        return (torch.zeros(1),)

    graph = timing.capture([lambda k=k: call(k) for k in range(3)], 4, CPU)
    assert graph.calls == 6
    before = list(counts)
    graph.run()
    assert [n - b for n, b in zip(counts, before, strict=True)] == [2, 2, 2]


def test_slow_calls_are_captured_less_often(clock):
    graph = timing.capture([lambda: clock.tick(timing.SLOW_S / 2)], 100, CPU)
    assert graph.calls == 2


def test_times_are_those_of_one_call(clock):
    seconds = itertools.cycle([3e-3, 4e-3, 5e-3])
    graph = timing.Graph(lambda: clock.tick(next(seconds)), 4, ())
    stats = timing.measure_graphs({"ticks": graph}, CPU, 0.0, 1e-3)["ticks"]
    assert stats.median_ms == pytest.approx(1.0)
    assert 0.75 < stats.p20_ms < 1.0 < stats.p80_ms < 1.25


def test_a_graph_that_computes_nothing_is_caught():
    want = torch.ones(3)
    result = want.clone()
    timing.check_replay("fine", timing.Graph(lambda: result.copy_(want), 1, (result,)), (want,))
    with pytest.raises(VerificationError, match="in a CUDA graph"):
        timing.check_replay("idle", timing.Graph(lambda: None, 1, (result,)), (want,))


def test_calls_are_warm_before_their_capture_and_nothing_is_collected_in_it(cuda):
    seen = []

    def call(k):
        cuda.calls.append(f"call {k}")
        seen.append((cuda.capturing, gc.isenabled()))
        return (torch.full((1,), float(k)),)

    graph = timing.capture([lambda: call(0), lambda: call(1)], 4, CUDA)
    begin, end = cuda.calls.index("begin"), cuda.calls.index("end")
    assert cuda.calls[begin - 1] == "sync"
    assert all(cuda.calls[:begin].count(f"call {k}") == 2 for k in (0, 1))
    assert cuda.calls[begin + 1 : end] == ["call 0", "call 1"] * 2
    assert seen[4:] == [(True, False)] * 4
    assert gc.isenabled()
    assert graph.calls == 4
    assert float(graph.result[0]) == 1.0
    graph.run()
    assert cuda.calls[-1] == "replay"


def test_a_capture_that_fails_is_ended_and_says_why(cuda):
    def call():
        if cuda.capturing:
            cuda.calls.append("bad")
            raise RuntimeError("synchronized")
        return (torch.zeros(1),)

    with pytest.raises(RuntimeError, match="synchronized"):
        timing.capture([call], 4, CUDA)
    assert cuda.calls[-1] == "end"
    assert not cuda.capturing


def test_wall_time_ends_when_the_device_is_done(cuda, clock):
    def run():
        cuda.calls.append("run")
        clock.tick(1e-3)

    seconds = host_sampler(CUDA, until_done=True)(run, 3)
    assert seconds == pytest.approx(3e-3)
    assert cuda.calls[:5] == ["sync", "run", "run", "run", "sync"]


def test_the_device_sleeps_while_calls_are_queued(cuda, clock):
    queued = timing.Queued(lambda: clock.tick(1e-3), 2e-3)
    seconds = timing.queue_sampler(CUDA)(queued, 5)
    assert seconds == pytest.approx(5e-3)
    assert cuda.slept == pytest.approx(1.5 * 5 * 2e-3 * 2e9)
    assert cuda.calls == ["wait"]


def test_on_a_cpu_nothing_sleeps(cuda, clock):
    queued = timing.Queued(lambda: None, 1.0)
    assert timing.queue_sampler(CPU)(queued, 2) == 0
    assert host_sampler(CPU, until_done=True)(lambda: None, 2) == 0
    assert cuda.slept == 0
    assert cuda.calls == []
