"""``--against``: ratios to torch beside those of an earlier run, and what got worse.

Milliseconds of two runs are those of two states of a machine. The contenders of a measurement took
turns, so that their ratio can be held against an earlier one. What moves it when nothing changed:

- Samples spread. The standard error of a median is 1.2533 sigma / sqrt(n); sigma is taken from the
  20th and 80th percentiles, and the variances of both contenders in both runs add up.
- Rounds of a measurement are no independent samples: neighbours resemble each other, and tensors
  lie where they lie. No spread shows that. So when something looks worse, every eighth job of its
  case is run again. Nothing changed in between; what 80 % of those ratios stay within gives the
  floor of the case. It is never less than 1 % a run, for what differs between processes only.
- Memory is fresh for torch in some runs and not in others, and costs up to five times. Where the
  page faults of torch differ by as much as 5 % of its time, the ratio is set aside.

Worse is what lost more than three times its noise, and as much again when it was run once more: a
burst of other work does not come back. The second time has a limit of its own, as long as the
first. A loss that is too small for a single ratio shows in groups, which are not run again: the
median change of many is known better than that of one.

Peaks of memory are not compared, for they have no spread.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from .results import GROUPED, TORCH, Result, by_subject, parse_csv
from .summary import geometric_mean

SURE = 3.0
"""Times the noise."""

MEDIAN_ERROR = 1.2533
"""Standard error of a median, in those of a mean."""

PERCENTILE_80 = 0.8416
"""Of a normal distribution, in sigma. Of 100 numbers, 80 are within :data:`WITHIN_80`."""

WITHIN_80 = 1.2816
LEAST_FLOOR = 0.01
SAMPLE_EVERY = 8
GROUP = 8
"""Ratios that are enough for a group."""

FAULT_MS = 0.5e-3
"""What a page fault takes, with clearing the page."""

OTHER_MEMORY = 0.05

Key = tuple[str, ...]


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as torch one of ours was in a run."""

    ours: Result
    torch: Result

    @cached_property
    def log(self) -> float:
        return math.log(self.ours.ratio_to_torch)

    @cached_property
    def variance(self) -> float:
        """Of the logarithm, as far as spreads show it."""
        return _variance(self.ours) + _variance(self.torch)

    @property
    def group(self) -> Key:
        r = self.ours
        return r.case, r.phase, r.contender, r.dtype, r.kind


def _variance(r: Result) -> float:
    sigma = math.log(r.p80_ms / r.p20_ms) / (2 * PERCENTILE_80)
    # the percentiles of few rounds are too close together; two rounds less make up for it
    return (MEDIAN_ERROR * sigma) ** 2 / max(r.rounds - 2, 1)


@dataclass(frozen=True)
class Change:
    """From one run to the other."""

    about: Key
    """Cells of the table."""
    then: float
    now: float
    noise: float
    """Standard deviation of the logarithm of their quotient."""

    @property
    def log(self) -> float:
        return math.log(self.now / self.then)

    @property
    def worse(self) -> bool:
        return self.log < -SURE * self.noise

    @property
    def better(self) -> bool:
        return self.log > SURE * self.noise


@dataclass(frozen=True)
class Comparison:
    """What came out."""

    worse: list[Change]
    better: int
    compared: int
    set_aside: int
    only_then: int
    only_now: int

    @property
    def passed(self) -> bool:
        """Whether something was compared, and nothing of it is worse."""
        return self.compared > 0 and not self.worse


def read_earlier(path: Path, cases: Collection[str]) -> list[Result]:
    """The rows of a file, or of all CSV files of a folder, that belong to some cases.

    Raises:
        ValueError: they cannot be read, or have nothing to compare with.
    """
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    rows: list[Result] = []
    for file in files:
        try:
            rows += parse_csv(file.read_text(encoding="utf-8").splitlines(), file)
        except (OSError, UnicodeError, csv.Error) as error:
            raise ValueError(f"{file}: cannot be read: {error}") from None
    rows = [r for r in rows if r.case in cases]
    if not ratios(rows):
        raise ValueError(f"{path}: there are no times beside torch's of {', '.join(sorted(cases))}")
    return rows


def ratios(results: Iterable[Result]) -> dict[Key, Ratio]:
    """Those of a run, by subject and contender."""
    return {
        (r.case, r.phase, who, r.dtype, r.shape, r.dim, r.label): Ratio(r, m[TORCH])
        for m in by_subject(r for r in results if _is_timed(r))
        if TORCH in m
        for who, r in m.items()
        if who in GROUPED
    }


def _is_timed(r: Result) -> bool:
    return all(0 < x < math.inf for x in (r.rounds, r.ratio_to_torch, r.p20_ms, r.p80_ms))


def to_repeat(earlier: Iterable[Result], measured: Sequence[Sequence[Result]]) -> list[int]:
    """Which jobs to run again: those in which something looks worse, and a sample of their cases.

    Args:
        earlier: the other run.
        measured: what each job gave.
    """
    then = ratios(earlier)
    suspicious = {
        i
        for i, rows in enumerate(measured)
        for key, now in ratios(rows).items()
        if key in then
        and not _other_memory(then[key], now)
        and _change(key, then[key], now, LEAST_FLOOR).worse
    }
    cases = {measured[i][0].case for i in suspicious}
    return sorted(suspicious | {i for i in _sample(measured) if measured[i][0].case in cases})


def compare(
    earlier: Iterable[Result],
    measured: Sequence[Sequence[Result]],
    repeated: Mapping[int, Sequence[Result]],
) -> Comparison:
    """Hold a run against an earlier one.

    Args:
        earlier: the earlier one.
        measured: what each job gave.
        repeated: what some of them, by their place, gave the second time.
    """
    then, now = ratios(earlier), ratios(itertools.chain(*measured))
    again = ratios(itertools.chain(*repeated.values()))
    floors = _floors(measured, repeated)
    both = [key for key in then if key in now]
    found = [key for key in both if not _other_memory(then[key], now[key])]
    worse: list[Change] = []
    better = 0
    groups: dict[Key, list[Change]] = {}
    for key in found:
        looks = [now[key]]
        if key in again and not _other_memory(then[key], again[key]):
            looks.append(again[key])
        floor = floors.get(key[0], LEAST_FLOOR)
        changes = [_change(key, then[key], look, floor) for look in looks]
        if all(c.worse for c in changes):
            worse.append(max(changes, key=lambda c: c.log))
        better += all(c.better for c in changes)
        groups.setdefault(now[key].group, []).append(changes[0])
    of_groups = [_of_group(about, c) for about, c in groups.items() if len(c) >= GROUP]
    return Comparison(
        worse=[c for c in of_groups if c.worse] + sorted(worse, key=lambda c: c.log),
        better=better,
        compared=len(found),
        set_aside=len(both) - len(found),
        only_then=len(then) - len(both),
        only_now=len(now) - len(both),
    )


def _change(key: Key, then: Ratio, now: Ratio, floor: float) -> Change:
    noise = math.sqrt(then.variance + now.variance + 2 * floor**2)
    return Change(key, then.ours.ratio_to_torch, now.ours.ratio_to_torch, noise)


def _of_group(about: Key, changes: Sequence[Change]) -> Change:
    case, phase, contender, dtype, kind = about
    title = case, phase, contender, dtype, f"{len(changes)} together", kind, ""
    then = geometric_mean([c.then for c in changes])
    single = math.sqrt(np.mean([c.noise**2 for c in changes]))
    noise = math.hypot(MEDIAN_ERROR * single / math.sqrt(len(changes)), math.sqrt(2) * LEAST_FLOOR)
    return Change(title, then, then * math.exp(np.median([c.log for c in changes])), noise)


def _other_memory(one: Ratio, other: Ratio) -> bool:
    """Whether torch paid for fresh memory in one of two runs. Files may not tell (NaN)."""
    cost = FAULT_MS * abs(one.torch.faults - other.torch.faults)
    return cost > OTHER_MEMORY * min(one.torch.median_ms, other.torch.median_ms)


def _sample(measured: Sequence[Sequence[Result]]) -> list[int]:
    """Some jobs of every case."""
    by_case: dict[str, list[int]] = {}
    for i, rows in enumerate(measured):
        if rows:
            by_case.setdefault(rows[0].case, []).append(i)
    return [i for jobs in by_case.values() for i in jobs[::SAMPLE_EVERY]]


def _floors(
    measured: Sequence[Sequence[Result]], repeated: Mapping[int, Sequence[Result]]
) -> dict[str, float]:
    """How far ratios move by themselves: of each case that was sampled, by its sample alone."""
    moved: dict[str, list[float]] = {}
    for i in _sample(measured):
        first, second = ratios(measured[i]), ratios(repeated.get(i, ()))
        for key in first.keys() & second.keys():
            if not _other_memory(first[key], second[key]):
                moved.setdefault(key[0], []).append(abs(first[key].log - second[key].log))
    return {
        case: max(LEAST_FLOOR, float(np.percentile(moves, 80)) / (WITHIN_80 * math.sqrt(2)))
        for case, moves in moved.items()
    }


def print_comparison(
    console: Console, comparison: Comparison, earlier: Sequence[Result], here: Result, path: Path
) -> None:
    """What it was compared with, what is worse, and how much there was to compare.

    Args:
        console: where to.
        comparison: what came out.
        earlier: the rows of the earlier run.
        here: any row of this run.
        path: where the earlier run is.
    """
    others = [
        f"{field} {', '.join(sorted(values - {str(getattr(here, field))}))}"
        for field in ("device", "torch", "backend", "threads")
        if (values := {str(getattr(r, field)) for r in earlier}) != {str(getattr(here, field))}
    ]
    commits = ", ".join(sorted({r.commit for r in earlier}))
    line = f"Against {path}, commit {commits}"
    if others:
        line += f". Not the same: {'; '.join(others)}. Ratios only compare where all of it is"
    console.print(f"{line}.", markup=False)
    if comparison.worse:
        title = f"Worse than before: {len(comparison.worse)}"
        table = Table(title=title, title_justify="left", header_style="bold")
        for head in ("case", "phase", "contender", "dtype", "shape", "dim", "of"):
            table.add_column(head)
        for head in ("times torch,\nthen", "now", "change", "noise,\nat most"):
            table.add_column(head, justify="right")
        for c in comparison.worse:
            change, noise = (f"{100 * math.expm1(x):.1f} %" for x in (c.log, -SURE * c.noise))
            table.add_row(*c.about, f"{c.then:.2f}", f"{c.now:.2f}", change, noise)
        console.print(table)
    console.print(
        f"Compared {comparison.compared} ratios to torch: {len(comparison.worse)} worse (groups "
        f"included), {comparison.better} better. Set aside {comparison.set_aside}, for torch paid "
        f"page faults in one of the two runs. Only there: {comparison.only_then}, only here: "
        f"{comparison.only_now}."
    )
