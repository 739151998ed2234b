"""How much of the machine other processes took while something was timed.

Operators that split their work over threads wait at the end for the slowest one. When another
process holds a core, that wait is a scheduler's time slice of some milliseconds, and a contender
that happens to use one thread looks hundreds of times faster. Such a run must not pass silently.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

_STAT = Path("/proc/stat")


class OtherLoad:
    """Cores that other processes used, on average, since this object was made; NaN where the system
    does not tell."""

    def __init__(self) -> None:
        self._start = _now()

    def cores(self) -> float:
        wall, busy, own = (b - a for a, b in zip(self._start, _now(), strict=True))
        return max(0.0, (busy - own) / wall) if wall > 0 else float("nan")


_FORGIVEN_CORES = 0.3
"""CPU time is counted in ticks of 10 ms, and the shortest cases last under a tenth of a second."""


def disturbed(other_cores: float, threads: int) -> bool:
    """Whether others were in the way of ``threads`` threads."""
    return other_cores + threads > (os.cpu_count() or threads) + _FORGIVEN_CORES


def _now() -> tuple[float, float, float]:
    """Seconds: on the clock, of all CPUs at work, of this process's CPU time."""
    own = time.process_time()
    try:
        user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = (
            int(field) for field in _STAT.read_text().split(maxsplit=11)[1:11]
        )
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        busy = float("nan")
    return time.perf_counter(), busy, own
