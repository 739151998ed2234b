"""Contenders timed in turns: clock speed, neighbours and malloc drift, and in rounds all of them
meet the same machine."""

from __future__ import annotations

import contextlib
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from .load import OtherLoad

MIN_SAMPLE_S = 200e-6
"""Shorter samples measure the clock and the interrupts more than the work."""

MIN_ROUNDS = 3
MAX_ROUNDS = 300


@dataclass(frozen=True)
class Contender:
    """Something to time, and what has to be set while it runs; setting it is not timed."""

    context: Callable[[], contextlib.AbstractContextManager[object]]
    run: Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call, over all rounds."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int
    other_cores: float
    """Cores that other processes used meanwhile; NaN where the system does not tell."""


def measure(
    contenders: Mapping[str, Contender], device: torch.device, seconds: float
) -> dict[str, Times]:
    """Time all of them round by round, in shuffled order, for some seconds.

    On a GPU a sample ends when the device is done, so that it is the longer of the device's time
    and the host's.
    """
    counts = {name: _warm_up(c, device) for name, c in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    order, shuffle = list(contenders), random.Random(0).shuffle
    with no_garbage_collection():
        others = OtherLoad()
        deadline = time.perf_counter() + seconds
        for done in range(MAX_ROUNDS):
            if done >= MIN_ROUNDS and time.perf_counter() > deadline:
                break
            shuffle(order)
            for name in order:
                took = _sample(contenders[name], counts[name], device)
                samples[name].append(took / counts[name])
        other_cores = others.cores()
    return {name: _times(values, other_cores) for name, values in samples.items()}


def _sample(contender: Contender, times: int, device: torch.device) -> float:
    """Seconds that so many calls take."""
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


def _warm_up(contender: Contender, device: torch.device) -> int:
    """How many calls fill a sample; calls until that is known, which warms caches and malloc."""
    times = 1
    while True:
        _sample(contender, 1, device)
        seconds = _sample(contender, times, device)
        if seconds >= MIN_SAMPLE_S:
            return times
        times = max(times + 1, math.ceil(1.1 * times * MIN_SAMPLE_S / max(seconds, 1e-7)))


def _times(seconds: list[float], other_cores: float) -> Times:
    p20, *_, p80 = statistics.quantiles(seconds, n=5, method="inclusive")
    median = statistics.median(seconds)
    return Times(1e3 * median, 1e3 * p20, 1e3 * p80, len(seconds), other_cores)


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect what is young before the rounds, and nothing during them.

    A full collection here would take longer than most cases; models are collected where they end.
    """
    gc.collect(1)
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
