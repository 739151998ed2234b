"""Measures how many cores other processes used while something was timed.

An operator that splits its work over threads waits for the slowest thread. If another process holds
a core, the operator waits for milliseconds, and a contender with a single thread looks hundreds of
times faster than it is.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

_STAT = Path("/proc/stat")
_FORGIVEN_CORES = 0.3
"""The cores that other processes may use unnoticed. The system counts CPU time in ticks of 10 ms,
which is coarse: the shortest cases take less than a tenth of a second."""


class OtherWork:
    """Measures the work of other processes, from its construction on.

    Args:
        own_cpu_s: returns the CPU seconds of the processes that do not count as others.
    """

    def __init__(self, own_cpu_s: Callable[[], float] = time.process_time) -> None:
        self._own_cpu_s = own_cpu_s
        self._start = _now(own_cpu_s)

    def cores(self) -> float:
        """Return how many cores other processes used on average; NaN if the system has no
        /proc/stat."""
        now = _now(self._own_cpu_s)
        wall, busy, own = (b - a for a, b in zip(self._start, now, strict=True))
        return max((busy - own) / wall, 0.0) if wall > 0 else math.nan  # max(nan, 0.0) is NaN


def disturbed(other_cores: float, threads: int) -> bool:
    """Return whether other processes took cores that ``threads`` threads needed."""
    return other_cores + threads > (os.cpu_count() or threads) + _FORGIVEN_CORES


def _now(own_cpu_s: Callable[[], float]) -> tuple[float, float, float]:
    """Return three times in seconds: of the clock, the busy time of all CPUs, our own CPU time."""
    own = own_cpu_s()
    try:
        user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = (
            int(field) for field in _STAT.read_text().split(maxsplit=11)[1:11]
        )
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        busy = math.nan
    return time.perf_counter(), busy, own
