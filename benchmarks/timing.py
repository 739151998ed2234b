"""Interleaved measurement: every contender gets its turn in every round of one process.

Clock speed, neighbours and the state of malloc drift over seconds. Contenders measured one after
the other would each meet another machine; in rounds they share it, and the median forgets the
rounds in which it misbehaved. The order is shuffled, so that nobody always runs on the caches that
the same predecessor left.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from wnkernel.cli.load import OtherLoad
from wnkernel.cli.timing import MAX_ROUNDS, MIN_ROUNDS, MIN_SAMPLE_S, no_garbage_collection

from .blame import blamed

try:
    import resource
except ImportError:  # Windows
    resource = None

Contender = Callable[[], object]
Sampler = Callable[[Contender, int], float]
"""Runs a contender n times in a row and returns the seconds that all n took."""


SAMPLES = 20
"""In a turn of :func:`least`."""


@dataclass(frozen=True)
class Stats:
    """Milliseconds of one call, over all rounds."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int
    other_cores: float
    """Cores that other processes used meanwhile."""
    faults: float = math.nan
    """Page faults of one call, the median as well; NaN where the system does not tell."""


def page_faults() -> float:
    """How often this process touched a page so far that the system had to find and clear first
    (minor page faults): what fresh memory costs. NaN where the system does not tell."""
    if resource is None:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def device_sampler(device: torch.device) -> Sampler:
    """Samples the time that the work takes on ``device``."""
    return _sample_events if device.type == "cuda" else _sample_wall


def host_sampler(device: torch.device) -> Sampler:
    """Samples the time that the calling thread spends, whatever it leaves to a device."""
    if device.type != "cuda":
        return _sample_wall

    def sample(run: Contender, times: int) -> float:
        torch.cuda.synchronize(device)
        seconds = _sample_wall(run, times)
        torch.cuda.synchronize(device)
        return seconds

    return sample


def _sample_wall(run: Contender, times: int) -> float:
    repeats = range(times)
    start = time.perf_counter()
    for _ in repeats:
        run()
    return time.perf_counter() - start


def _sample_events(run: Contender, times: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def measure(
    contenders: Mapping[str, Contender],
    sample: Sampler,
    budget_s: float,
    *,
    min_sample_s: float = MIN_SAMPLE_S,
    own_cpu_s: Callable[[], float] = time.process_time,
    faults_of: Callable[[Contender], float] = lambda _: page_faults(),
) -> dict[str, Stats]:
    """Time all contenders round by round until ``budget_s`` seconds are spent.

    At least :data:`MIN_ROUNDS` rounds are made, whatever they take.

    Args:
        contenders: who takes turns.
        sample: how a turn is timed.
        budget_s: for all rounds.
        min_sample_s: how long a turn lasts at least.
        own_cpu_s: see :class:`~wnkernel.cli.load.OtherLoad`.
        faults_of: the page faults of a contender's process so far.

    Raises:
        ContenderError: one of them fails.
    """
    counts = {}
    for name, run in contenders.items():
        with blamed(name):
            counts[name] = _warm_up(run, sample, min_sample_s)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    faults: dict[str, list[float]] = {name: [] for name in contenders}
    order, shuffle = list(contenders), random.Random(0).shuffle
    with no_garbage_collection():
        others = OtherLoad(own_cpu_s)
        deadline = time.perf_counter() + budget_s
        for done in range(MAX_ROUNDS):
            if done >= MIN_ROUNDS and time.perf_counter() > deadline:
                break
            shuffle(order)
            for name in order:
                run = contenders[name]
                before = faults_of(run)
                with blamed(name):
                    seconds = sample(run, counts[name])
                faults[name].append((faults_of(run) - before) / counts[name])
                times[name].append(seconds / counts[name])
        other_cores = others.cores()
    return {name: _stats(times[name], other_cores, faults[name]) for name in contenders}


def least(
    contenders: Mapping[str, Contender],
    times: int,
    seconds: float,
    during: Callable[[str], AbstractContextManager[None]] = nullcontext,
) -> dict[str, float]:
    """Seconds of a call of each, for figures that other work can only add to: the least of samples
    of so many calls, in turns.

    Args:
        contenders: who takes turns.
        times: calls of a sample.
        seconds: for all turns.
        during: what surrounds a turn of the contender that it is given.
    """
    best = dict.fromkeys(contenders, float("inf"))
    with no_garbage_collection():
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for who, run in contenders.items():
                with during(who):
                    for _ in range(SAMPLES):
                        best[who] = min(best[who], _sample_wall(run, times) / times)
    return best


def _warm_up(run: Contender, sample: Sampler, min_sample_s: float) -> int:
    """How many calls fill a sample; calls until that is known, which warms caches and malloc."""
    times = 1
    while True:
        run()
        seconds = sample(run, times)
        if seconds >= min_sample_s:
            return times
        times = max(times + 1, math.ceil(1.1 * times * min_sample_s / max(seconds, 1e-7)))


def _stats(seconds: list[float], other_cores: float, faults: list[float]) -> Stats:
    p20, median, p80 = map(float, np.percentile(np.asarray(seconds) * 1e3, (20, 50, 80)))
    return Stats(median, p20, p80, len(seconds), other_cores, float(np.median(faults)))
