"""Made-up results of the benchmark."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from benchmarks.contenders import COPY, OURS, TORCH
from benchmarks.environment import environment
from benchmarks.results import Result, Subject, rows
from wnkernel.cli.timing import Times

where = functools.cache(environment)
"""It asks git."""


def measured(
    case: str = "layers",
    ms: Mapping[str, float] = {OURS: 1.0, TORCH: 1.0, COPY: 1.0},
    *,
    label: str = "model",
    phase: str = "forward",
    dtype: str = "float32",
    kind: str = "first",
    numel: int = 32,
    spread: float = 0.0,
    rounds: int = 100,
    faults: Mapping[str, float] | None = None,
    limit: str = COPY,
) -> list[Result]:
    """The rows of one measurement with these medians.

    Args:
        case, label, phase, dtype, kind, numel: of the subject.
        ms: medians of the contenders.
        spread: how far the 20th and the 80th percentile are from the median, as a share of it.
        rounds: of the measurement.
        faults: page faults of a call; none by default.
        limit: the contender that the others are held against.
    """
    about = Subject(case, label, phase, dtype, f"8x{numel // 8}", "0", kind, numel, 4 * numel)
    stats = {
        who: Times(x, x * (1 - spread), x * (1 + spread), rounds, 0.0, (faults or {}).get(who, 0.0))
        for who, x in ms.items()
    }
    return rows(about, where("cpu", None), stats, limit=limit)
