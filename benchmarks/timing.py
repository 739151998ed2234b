"""Timing of contenders in turns, by the rounds of ``wnkernel bench``, and which of them failed."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from wnkernel.cli.timing import Times, in_rounds, no_garbage_collection

try:
    import resource
except ImportError:  # on Windows
    resource = None

Contender = Callable[[], object]
Sampler = Callable[[Contender, int], float]  # Runs a contender n times; returns the seconds of all.
SAMPLES = 20  # In one turn of :func:`least`.


class ContenderError(Exception):
    """One contender failed; the cause is the exception that it raised."""

    def __init__(self, who: str) -> None:
        super().__init__(who)
        self.who = who

    def __str__(self) -> str:
        return f"{self.who}: {type(self.__cause__).__name__}: {self.__cause__}"


@contextmanager
def blamed(who: str) -> Iterator[None]:
    """Blame one contender for every exception inside this context."""
    try:
        yield
    except ContenderError:
        raise
    except Exception as error:
        raise ContenderError(who) from error


def page_faults() -> float:
    """Return the minor page faults of this process so far: touches of pages that the system first
    had to clear. They are the cost of fresh memory. NaN if the system does not tell."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt if resource else math.nan


def device_sampler(device: torch.device) -> Sampler:
    """Return a sampler of the time that the work takes on ``device``."""
    return _sample_events if device.type == "cuda" else _sample_wall


def host_sampler(device: torch.device, *, until_done: bool = False) -> Sampler:
    """Return a sampler of the time that the calling thread spends without its device, or, with
    ``until_done``, the time until both are done."""
    if device.type != "cuda":
        return _sample_wall

    def sample(run: Contender, times: int) -> float:
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        seconds = _sample_wall(run, times)
        torch.cuda.synchronize(device)
        return time.perf_counter() - start if until_done else seconds

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
    min_sample_s: float | None = None,
    faults_of: Callable[[str], float] = lambda name: page_faults(),
) -> dict[str, Times]:
    """Time all contenders by :func:`~wnkernel.cli.timing.in_rounds`, with page faults."""

    def turn(name: str, times: int) -> float:
        with blamed(name):
            return sample(contenders[name], times)

    turns = {name: functools.partial(turn, name) for name in contenders}
    return in_rounds(turns, budget_s, least_s=min_sample_s, faults_of=faults_of)


def least(
    contenders: Mapping[str, Contender],
    times: int,
    seconds: float,
    during: Callable[[str], AbstractContextManager[None]] = nullcontext,
) -> dict[str, float]:
    """Return the seconds of one call of each contender, as the minimum of many samples of ``times``
    calls, because other work can only increase it. ``during`` is a context for each turn."""
    best = dict.fromkeys(contenders, float("inf"))
    with no_garbage_collection():
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for who, run in contenders.items():
                with during(who):
                    for _ in range(SAMPLES):
                        best[who] = min(best[who], _sample_wall(run, times) / times)
    return best
