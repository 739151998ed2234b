"""``--against``: compares ratios to torch with those of an earlier run, and finds what got worse.

Milliseconds of two runs describe two states of a machine. But the contenders of one measurement
took turns, so their ratio can be compared with an earlier one. A ratio also moves if nothing
changed:

- Samples spread. The standard error of a median is 1.2533 sigma / sqrt(n). Sigma comes from the
  20th and 80th percentiles; the variances of both contenders in both runs add up.
- Rounds of a measurement are not independent: neighbours resemble each other, and tensors keep
  their addresses. No spread shows that. So if something looks worse, every eighth job of its case
  runs again. Nothing changed in between, so the range of 80 % of these ratios is the noise floor of
  the case. The floor is at least 1 % per run, for differences between processes.
- Memory is fresh for torch in some runs only, and then costs up to five times as much. If the page
  faults of torch differ by 5 % of its time or more, the ratio is left out.

A ratio is worse if it lost more than three times its noise, and as much again when its job ran once
more, because bursts of other work do not repeat. A loss that is too small for a single ratio shows
in groups, which do not run again: the median change of many ratios is more certain than one change.
Peaks of memory are not compared, because they have no spread.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from rich.console import Console

from .contenders import OWN, TORCH
from .report import show
from .results import Result, read_csv

SURE = 3.0  # Times the noise.
MEDIAN_ERROR = 1.2533  # Standard error of a median, in those of a mean.
# The 80th percentile of a normal distribution, and the bound of its middle 80 %, both in sigma.
PERCENTILE_80, WITHIN_80 = 0.8416, 1.2816
LEAST_FLOOR = 0.01
SAMPLE_EVERY = 8
GROUP = 8  # The number of ratios that makes a group.
# The time of a page fault, which clears the page, and the share of torch's time that counts.
FAULT_MS, OTHER_MEMORY = 0.5e-3, 0.05
KEY = ["case", "phase", "contender", "dtype", "shape", "dim", "label"]  # The cells of the table.
SUBJECT = [name for name in KEY if name != "contender"]


class Change(NamedTuple):
    """The change of one ratio from the earlier run to this one."""

    about: tuple[str, ...]  # Cells of the table.
    then: float
    now: float
    noise: float  # Standard deviation of the logarithm of now / then.


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison."""

    worse: list[Change]
    better: int
    compared: int
    set_aside: int
    only_then: int
    only_now: int

    @property
    def passed(self) -> bool:
        """Whether something was compared and nothing is worse."""
        return self.compared > 0 and not self.worse


def read_earlier(path: Path, cases: Collection[str]) -> list[Result]:
    """Read the rows of some cases from a CSV file, or from all CSV files of a folder. Raises
    ValueError if they cannot be read, or no row can be compared."""
    rows: list[Result] = []
    for file in sorted(path.glob("*.csv")) if path.is_dir() else [path]:
        try:
            rows += [r for r in read_csv(file) if r.case in cases]
        except (OSError, UnicodeError, csv.Error) as error:
            raise ValueError(f"{file}: cannot be read: {error}") from None
    if ratios([rows]).empty:
        raise ValueError(f"{path}: there are no times beside torch's of {', '.join(sorted(cases))}")
    return rows


def ratios(jobs: Iterable[Sequence[Result]]) -> pd.DataFrame:
    """Return how many times as fast as torch ours were, by :data:`KEY`; of equal keys the last
    counts. ``variance`` is that of the logarithm, as far as spreads show it. ``job`` is the number
    of the job."""
    rows = [vars(r) | {"job": i} for i, found in enumerate(jobs) for r in found]
    frame = pd.DataFrame(rows, columns=[*Result.__dataclass_fields__, "job"])
    needed = frame[["rounds", "ratio_to_torch", "p20_ms", "p80_ms"]].astype(float)
    is_timed = ((needed > 0) & (needed < math.inf)).all(axis=1)
    frame = frame[is_timed].drop_duplicates(KEY, keep="last")
    numbers = frame[["p20_ms", "p80_ms", "rounds"]].astype(float)
    sigma = np.log(numbers.p80_ms / numbers.p20_ms) / (2 * PERCENTILE_80)
    # The percentiles of few rounds are too close together; two rounds less make up for this.
    frame["variance"] = (MEDIAN_ERROR * sigma) ** 2 / (numbers.rounds - 2).clip(lower=1)
    torchs = frame[frame.contender == TORCH].set_index(SUBJECT)
    torchs = torchs[["median_ms", "faults", "variance"]].add_prefix("torch_")
    frame = frame[frame.contender.isin(OWN)].join(torchs, on=SUBJECT, how="inner")
    frame["variance"] += frame.torch_variance
    numbers = ["ratio_to_torch", "variance", "torch_median_ms", "torch_faults"]
    return frame.set_index(KEY)[[*numbers, "kind", "job"]].astype(dict.fromkeys(numbers, float))


def _both(then: pd.DataFrame, now: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the ratios that two runs have in common and that can be compared, and those for which
    torch paid for fresh memory in one of the runs. (Old files may not tell.)"""
    both = then.add_suffix("_then").join(now.add_suffix("_now"), how="inner")
    both = both.rename(columns={"ratio_to_torch_then": "then", "ratio_to_torch_now": "now"})
    both["log"] = np.log(both.now / both.then)
    both["spread"] = both.variance_then + both.variance_now
    cost = FAULT_MS * (both.torch_faults_then - both.torch_faults_now).abs()
    aside = cost > OTHER_MEMORY * both.filter(like="torch_median_ms").min(axis=1)
    return both[~aside], both[aside]


def _noise(both: pd.DataFrame, floors: Mapping[str, float]) -> pd.Series:
    floor = [floors.get(case, LEAST_FLOOR) for case in both.index.get_level_values("case")]
    return np.sqrt(both.spread + 2 * np.array(floor, dtype=float) ** 2)


def to_repeat(earlier: Sequence[Result], measured: Sequence[Sequence[Result]]) -> list[int]:
    """Return which jobs to run again: those in which something looks worse, and a sample of their
    cases."""
    both, _ = _both(ratios([earlier]), ratios(measured))
    suspicious = set(map(int, both.job_now[both.log < -SURE * _noise(both, {})]))
    cases = {measured[i][0].case for i in suspicious}
    return sorted(suspicious | {i for i in _sample(measured) if measured[i][0].case in cases})


def compare(
    earlier: Sequence[Result],
    measured: Sequence[Sequence[Result]],
    repeated: Mapping[int, Sequence[Result]],
) -> Comparison:
    """Compare the results of each job with an earlier run. ``repeated`` has the results of the jobs
    that ran a second time, by their number."""
    then, now, floors = ratios([earlier]), ratios(measured), _floors(measured, repeated)
    found, aside = _both(then, now)
    found["noise"] = _noise(found, floors)
    again, _ = _both(then, ratios(repeated.values()))
    again["noise"] = _noise(again, floors)
    again = again.reindex(found.index)
    worse = (found.log < -SURE * found.noise) & ~(again.log >= -SURE * again.noise)
    better = (found.log > SURE * found.noise) & ~(again.log <= SURE * again.noise)
    milder = found.where(~(again.log > found.log), again)[worse].sort_values("log")
    return Comparison(
        worse=[*_groups(found), *map(Change, milder.index, milder.then, milder.now, milder.noise)],
        better=int(better.sum()),
        compared=len(found),
        set_aside=len(aside),
        only_then=len(then) - len(found) - len(aside),
        only_now=len(now) - len(found) - len(aside),
    )


def _groups(found: pd.DataFrame) -> Iterable[Change]:
    """Return the groups of ratios that are worse together."""
    by = ["case", "phase", "contender", "dtype", "kind_now"]
    for (*about, kind), group in found.groupby(by, sort=False):
        n, log = len(group), float(group.log.median())
        single = MEDIAN_ERROR * math.sqrt((group.noise**2).mean() / n)
        noise = math.hypot(single, math.sqrt(2) * LEAST_FLOOR)
        if n >= GROUP and log < -SURE * noise:
            then = math.exp(np.log(group.then).mean())
            yield Change((*about, f"{n} together", kind, ""), then, then * math.exp(log), noise)


def _sample(measured: Sequence[Sequence[Result]]) -> list[int]:
    """Return the numbers of some jobs of every case."""
    by_case: dict[str, list[int]] = {}
    for i, rows in enumerate(measured):
        if rows:
            by_case.setdefault(rows[0].case, []).append(i)
    return [i for jobs in by_case.values() for i in jobs[::SAMPLE_EVERY]]


def _floors(
    measured: Sequence[Sequence[Result]], repeated: Mapping[int, Sequence[Result]]
) -> dict[str, float]:
    """Return the noise floor of each sampled case: how far the ratios of its sample moved by
    themselves."""
    sampled = [i for i in _sample(measured) if i in repeated]
    both, _ = _both(ratios(measured[i] for i in sampled), ratios(repeated[i] for i in sampled))
    moves = both.log.abs().groupby(level="case").quantile(0.8)
    return dict((moves / (WITHIN_80 * math.sqrt(2))).clip(lower=LEAST_FLOOR))


def print_comparison(
    console: Console, comparison: Comparison, earlier: Sequence[Result], here: Result, path: Path
) -> None:
    """Print what was compared with which run, what is worse, and how much could be compared."""
    others = [
        f"{field} {', '.join(sorted(values - {str(getattr(here, field))}))}"
        for field in ("device", "torch", "backend", "threads")
        if (values := {str(getattr(r, field)) for r in earlier}) != {str(getattr(here, field))}
    ]
    line = f"Against {path}, commit {', '.join(sorted({r.commit for r in earlier}))}"
    if others:
        line += f". Not the same: {'; '.join(others)}. Ratios only compare where all of it is"
    console.print(f"{line}.", markup=False)
    rows = []
    for about, then, now, noise in comparison.worse:
        percent = (f"{100 * x:.1f} %" for x in (now / then - 1, math.expm1(-SURE * noise)))
        rows.append((*about, f"{then:.2f}", f"{now:.2f}", *percent))
    heads = ("case", "phase", "contender", "dtype", "shape", "dim", "of")
    figures = ("times torch,\nthen", "now", "change", "noise,\nat most")
    show(console, f"Worse than before: {len(rows)}", heads + figures, rows, left=len(heads))
    console.print(
        f"Compared {comparison.compared} ratios to torch: {len(rows)} worse (groups "
        f"included), {comparison.better} better. Set aside {comparison.set_aside}, for torch paid "
        f"page faults in one of the two runs. Only there: {comparison.only_then}, only here: "
        f"{comparison.only_now}."
    )
