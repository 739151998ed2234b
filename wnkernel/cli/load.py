"""How much of the machine other processes took while something was timed.

Operators that split their work over threads wait at the end for the slowest one. When another
process holds a core, that wait is some milliseconds, and a contender that happens to use one thread
looks hundreds of times faster.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

_STAT = Path("/proc/stat")
_FORGIVEN_CORES = 0.3
"""CPU time is counted in ticks of 10 ms, and the shortest cases last under a tenth of a second."""


class OtherLoad:
    """Watches from when it is made.

    Args:
        own_cpu_s: CPU seconds of the processes that do not count as others.
    """

    def __init__(self, own_cpu_s: Callable[[], float] = time.process_time) -> None:
        self._own_cpu_s = own_cpu_s
        self._start = _now(own_cpu_s)

    def cores(self) -> float:
        """Cores that other processes used on average; NaN where the system does not tell."""
        now = _now(self._own_cpu_s)
        wall, busy, own = (b - a for a, b in zip(self._start, now, strict=True))
        return max((busy - own) / wall, 0.0) if wall > 0 else math.nan  # the first, if it is NaN


def disturbed(other_cores: float, threads: int) -> bool:
    """Whether others were in the way of so many threads."""
    return other_cores + threads > (os.cpu_count() or threads) + _FORGIVEN_CORES


def _now(own_cpu_s: Callable[[], float]) -> tuple[float, float, float]:
    """Seconds: on the clock, of all CPUs at work, of our own CPU time."""
    own = own_cpu_s()
    try:
        user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = (
            int(field) for field in _STAT.read_text().split(maxsplit=11)[1:11]
        )
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        busy = math.nan
    return time.perf_counter(), busy, own
