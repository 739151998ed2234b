"""Times contenders in turns. The speed of a machine drifts with its clock, its other processes and
malloc; in rounds the drift affects all contenders alike."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from .other_work import OtherWork

MIN_SAMPLE_S = 200e-6
"""The shortest sample. A shorter one measures the clock and interrupts more than the work."""

MIN_ROUNDS = 3
MAX_ROUNDS = 300


Sample = Callable[[int], float]
"""Runs a contender a given number of times, and returns the seconds for all calls together."""


@dataclass(frozen=True)
class Contender:
    """A function to time, and the context in which it runs. Entering the context is not timed."""

    context: Callable[[], contextlib.AbstractContextManager[object]]
    run: Callable[[], object]


@dataclass(frozen=True)
class Times:
    """The statistics of all rounds, in milliseconds for one call."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int
    other_cores: float
    """The cores that other processes used meanwhile; NaN if the system does not tell."""
    faults: float = math.nan
    """The median of the page faults of one call; NaN if page faults were not counted."""


def measure(
    contenders: Mapping[str, Contender], device: torch.device, seconds: float
) -> dict[str, Times]:
    """Time all contenders round by round, in shuffled order, for some seconds.

    On a GPU a sample ends when the device is done. So its time is the larger one of the device's
    time and the host's time.
    """
    samples = {name: functools.partial(_sample, c, device) for name, c in contenders.items()}
    return in_rounds(samples, seconds)


def in_rounds(
    samples: Mapping[str, Sample],
    seconds: float,
    *,
    least_s: float | None = None,
    own_cpu_s: Callable[[], float] = time.process_time,
    faults_of: Callable[[str], float] = lambda name: math.nan,
) -> dict[str, Times]:
    """Take samples in rounds, each in shuffled order, at least :data:`MIN_ROUNDS` of them.

    Args:
        samples: for each contender, the function that times it.
        seconds: no further round begins after this time.
        least_s: the shortest duration of a sample; by default :data:`MIN_SAMPLE_S`.
        own_cpu_s: see :class:`~wnkernel.cli.other_work.OtherWork`.
        faults_of: returns the number of page faults of a contender so far.
    """
    least_s = MIN_SAMPLE_S if least_s is None else least_s
    counts = {name: _calls(sample, least_s) for name, sample in samples.items()}
    times: dict[str, list[float]] = {name: [] for name in samples}
    faults: dict[str, list[float]] = {name: [] for name in samples}
    order, shuffle = list(samples), random.Random(0).shuffle
    with no_garbage_collection():
        others = OtherWork(own_cpu_s)
        deadline = time.perf_counter() + seconds
        for done in range(MAX_ROUNDS):
            if done >= MIN_ROUNDS and time.perf_counter() > deadline:
                break
            shuffle(order)
            for name in order:
                before = faults_of(name)
                times[name].append(samples[name](counts[name]) / counts[name])
                faults[name].append((faults_of(name) - before) / counts[name])
        other_cores = others.cores()
    return {name: _times(times[name], other_cores, faults[name]) for name in samples}


def _sample(contender: Contender, device: torch.device, times: int) -> float:
    """Return the seconds that ``times`` calls take."""
    with contender.context():
        run = contender.run
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(times):
            run()
        _synchronize(device)
        return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def _calls(sample: Sample, least_s: float) -> int:
    """Return how many calls fill a sample. Trying this out also warms up caches and malloc."""
    times = 1
    sample(times)
    while (seconds := sample(times)) < least_s:
        times = max(times + 1, math.ceil(1.1 * times * least_s / max(seconds, 1e-7)))
    return times


def _times(seconds: list[float], other_cores: float, faults: list[float]) -> Times:
    p20, *_, p80 = (1e3 * s for s in statistics.quantiles(seconds, n=5, method="inclusive"))
    median = 1e3 * statistics.median(seconds)
    return Times(median, p20, p80, len(seconds), other_cores, statistics.median(faults))


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect the young generations of garbage before the rounds, and none during the rounds.

    A full collection here would take longer than most cases. The benchmarks collect a model where
    they drop it.
    """
    gc.collect(1)
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
