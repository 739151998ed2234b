"""How much of the machine other processes took while something was timed.

Operators that split their work over threads wait at the end for the slowest one. When another
process holds a core, that wait is some milliseconds, and a contender that happens to use one thread
looks hundreds of times faster.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

_STAT = Path("/proc/stat")
_FORGIVEN_CORES = 0.3
"""CPU time is counted in ticks of 10 ms."""


class OtherLoad:
    """Watches from when it is made."""

    def __init__(self) -> None:
        self._start = _now()

    def cores(self) -> float | None:
        """Cores that other processes used on average; None where the system does not tell."""
        start, now = self._start, _now()
        if start is None or now is None:
            return None
        wall, busy, own = (b - a for a, b in zip(start, now, strict=True))
        return max(0.0, (busy - own) / wall) if wall > 0 else None


def disturbed(other_cores: float | None, threads: int) -> bool:
    """Whether others were in the way of so many threads."""
    if other_cores is None:
        return False
    return other_cores + threads > (os.cpu_count() or threads) + _FORGIVEN_CORES


def _now() -> tuple[float, float, float] | None:
    """Seconds: on the clock, of all CPUs at work, of our own CPU time."""
    try:
        user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = (
            int(field) for field in _STAT.read_text().split(maxsplit=11)[1:11]
        )
    except (OSError, ValueError):
        return None
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), busy, time.process_time()
