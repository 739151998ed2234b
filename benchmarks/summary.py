"""What a run comes to: every case that is lost, and geometric means beside what is aimed at."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from wnkernel.cli.load import disturbed

from .models import ALONE, STEP
from .report import faults
from .results import (
    COMPILED,
    FORWARD,
    FORWARD_BACKWARD,
    FUSED,
    GROUPED,
    LEGACY,
    OURS,
    READ,
    TORCH,
    UNCHANGED,
    VERSION,
    Result,
    by_subject,
)

LARGE = 1_000_000
"""Above this many elements the memory limit is what counts; below, it is lost in call overhead."""

LARGE_MODEL = 12_500_000
"""Elements of a model of 50 MB."""


@dataclass(frozen=True)
class Aim:
    """What a group of cases should reach against torch (times as fast), on two cores."""

    title: str
    belongs: Callable[[Result], bool]
    geomean: float | None = None
    least: float | None = None
    contender: str = OURS
    limit: float | None = None
    """At most this many times the copy limit, in the geometric mean."""
    torch_over: float = 0.0
    """Only where torch takes more than this many times the copy limit: elsewhere there is nothing
    to win."""

    def rows(self, measurements: Sequence[dict[str, Result]]) -> list[Result]:
        """The group."""
        found = [m for m in measurements if self.contender in m]
        if self.torch_over:
            found = [m for m in found if m[TORCH].ratio_to_limit > self.torch_over]
        return [m[self.contender] for m in found if self.belongs(m[self.contender])]


def _layers(phase: str, dtype: str, *kinds: str) -> Callable[[Result], bool]:
    return lambda r: (
        r.case == "layers" and r.phase == phase and r.dtype == dtype and r.kind in kinds
    )


def _of_case(case: str, phase: str | None = None) -> Callable[[Result], bool]:
    return lambda r: r.case == case and phase in (None, r.phase)


def _weight_norms(r: Result) -> bool:
    return r.case == "fused" or (r.case == "models" and r.phase == ALONE)


def _large(r: Result) -> bool:
    return r.case == "fused" and r.numel > LARGE_MODEL


def _fused(model: str) -> Callable[[Result], bool]:
    return lambda r: r.case == "fused" and r.label == model


FORGIVEN_SHARE = 0.05
"""Of the cases may be disturbed by other processes before the run is called untrustworthy."""

HOST_SHARE = {OURS: 0.6, UNCHANGED: 0.25}
"""Aim of the host cost of ``layer.weight``: at most this share of torch's."""

SLOW_TORCH = 1.5
"""Times the copy limit."""

_ROWS = "float32", "first", "last"
AIMS = (
    Aim("float32, dims 0 and last", _layers(FORWARD_BACKWARD, *_ROWS), 1.25, 0.97),
    Aim("the same, forward", _layers(FORWARD, *_ROWS), 1.1, 0.95),
    Aim("the same, forward and reader", _layers(READ, *_ROWS)),
    Aim("float32, middle dims", _layers(FORWARD_BACKWARD, "float32", "middle"), 6.0),
    Aim("float32, whole tensor", _layers(FORWARD_BACKWARD, "float32", "whole"), 4.0),
    Aim("bfloat16, dims 0 and last", _layers(FORWARD_BACKWARD, "bfloat16", "first", "last"), 1.8),
    Aim("one call, 64 elements", _of_case("operators"), least=1.0),
    Aim("host cost of layer.weight", _of_case("host"), 1 / HOST_SHARE[OURS]),
    Aim(
        "the same, from an unchanged group",
        _of_case("host"),
        1 / HOST_SHARE[UNCHANGED],
        contender=UNCHANGED,
    ),
    Aim(
        f"models one by one, torch over {SLOW_TORCH} limits",
        _weight_norms,
        1.3,
        torch_over=SLOW_TORCH,
    ),
    Aim("models, training step, one by one", _of_case("models", STEP)),
    Aim("models of 50 MB and more, one by one", _large),
    Aim("the same, fused", _large, contender=FUSED, limit=1.2),
    Aim("the same, fused, version", _large, contender=VERSION),
    Aim("models compiled, one by one", _of_case("compile", ALONE), contender=OURS + COMPILED),
    Aim("the same, fused", _of_case("compile", ALONE), contender=FUSED + COMPILED),
    Aim("ParallelWaveGAN, fused", _fused("ParallelWaveGAN"), 2.0, contender=FUSED),
)


def print_losses(console: Console, results: Sequence[Result]) -> None:
    """Every case in which torch is faster, the worst first. What is compiled has to be faster than
    torch's compiled and uncompiled."""
    found = [
        (_best_torch(m, r).median_ms / r.median_ms, r, m)
        for m in by_subject(results)
        for r in m.values()
        if r.rounds and r.contender in GROUPED
    ]
    lost = [(ratio, r, m) for ratio, r, m in found if ratio < 1]
    if not lost:
        console.print("Where we lose: nowhere in this run.")
        return
    table = Table(title=f"Where we lose: {len(lost)} of {len(found)} cases", title_justify="left")
    for head in ("case", "phase", "contender", "dtype", "shape", "dim", "of"):
        table.add_column(head)
    for head in ("ms", "torch ms", "times torch", "page faults,\ntorch / ours"):
        table.add_column(head, justify="right")
    for ratio, r, m in sorted(lost, key=operator.itemgetter(0)):
        table.add_row(
            r.case,
            r.phase,
            r.contender,
            r.dtype,
            r.shape,
            r.dim,
            r.label,
            f"{r.median_ms:.4g}",
            f"{_best_torch(m, r).median_ms:.4g}",
            f"{ratio:.2f}",
            faults(m, r),
        )
    console.print(table)


def _best_torch(m: Mapping[str, Result], r: Result) -> Result:
    names = (TORCH, TORCH + COMPILED) if r.contender.endswith(COMPILED) else (TORCH,)
    return min((m[name] for name in names if name in m), key=lambda one: one.median_ms)


def print_summary(console: Console, results: Sequence[Result], device: torch.device) -> None:
    """The table of aims, and the accuracy of both sides."""
    if device.type != "cpu":
        console.print("The aims here are those for a CPU; python -m benchmarks.gpu has others.")
    timed = [r for r in results if r.rounds]
    measurements = by_subject(timed)
    title = f"Summary: times as fast as torch on {results[0].device}"
    table = Table(title=title, title_justify="left")
    for head in (
        "group",
        "cases",
        "geometric\nmean",
        "aim",
        "least",
        "aim",
        "times the copy\nlimit, all",
        "aim",
        f"over {LARGE // 10**6} M\nelements",
    ):
        table.add_column(head, justify="left" if head == "group" else "right")
    for aim in AIMS:
        group = aim.rows(measurements)
        if not group:
            continue
        ratios = [r.ratio_to_torch for r in group]
        limits = _limits(group)
        table.add_row(
            aim.title,
            str(len(group)),
            f"{geometric_mean(ratios):.2f}",
            _verdict(geometric_mean(ratios), aim.geomean),
            f"{min(ratios):.2f}",
            _verdict(min(ratios), aim.least),
            _mean(limits),
            _verdict(geometric_mean(limits), aim.limit, at_most=True),
            _mean(_limits([r for r in group if r.numel > LARGE])),
        )
    if table.row_count:
        console.print(table)
    ours = [r for r in timed if r.contender in GROUPED]
    _print_host_share(console, ours)
    _print_errors(console, timed)
    _print_disturbance(console, ours)


def geometric_mean(values: Sequence[float]) -> float:
    """NaN of nothing."""
    return float(np.exp(np.mean(np.log(values)))) if len(values) else float("nan")


def _verdict(value: float, aim: float | None, *, at_most: bool = False) -> str:
    if aim is None:
        return ""
    met = value <= aim if at_most else value >= aim
    color, sign = "green" if met else "red", "<=" if at_most else ">="
    return f"[{color}]{sign} {aim:.2f} {'met' if met else 'missed'}[/{color}]"


def _limits(group: Sequence[Result]) -> list[float]:
    return [r.ratio_to_limit for r in group if r.ratio_to_limit == r.ratio_to_limit]


def _mean(values: Sequence[float]) -> str:
    return f"{geometric_mean(values):.2f}" if values else ""


def _print_host_share(console: Console, ours: Sequence[Result]) -> None:
    for who, aim in HOST_SHARE.items():
        host = [r.ratio_to_torch for r in ours if r.case == "host" and r.contender == who]
        if host:
            console.print(
                f"Host cost of layer.weight, {who}: {1 / geometric_mean(host):.2f} of torch's "
                f"parametrization, at worst {1 / min(host):.2f} (aim: at most {aim})."
            )


def _print_errors(console: Console, results: Sequence[Result]) -> None:
    """Speed means little beside a result that is off: the worst relative errors of each side."""
    for dtype in dict.fromkeys(r.dtype for r in results):
        worst = {
            who: max(
                (r for r in results if r.contender == who and r.dtype == dtype and r.error >= 0),
                key=lambda r: r.error,
                default=None,
            )
            for who in (OURS, FUSED, TORCH, LEGACY)
        }
        found = [
            f"{who} {r.error:.1e} ({r.shape if r.case == 'layers' else r.label} {r.dim})".replace(
                " )", ")"
            )
            for who, r in worst.items()
            if r
        ]
        if found:
            console.print(f"Largest error against float64, {dtype}: {'; '.join(found)}.")


def _print_disturbance(console: Console, ours: Sequence[Result]) -> None:
    bad = [r for r in ours if disturbed(r.other_cores, r.threads)]
    if len(bad) > FORGIVEN_SHARE * len(ours):
        worst = max(r.other_cores for r in bad)
        console.print(
            f"Do not trust this run: other processes were in the way in {len(bad)} of {len(ours)} "
            f"cases (up to {worst:.1f} cores; column other_cores of the CSV).",
            style="bold red",
        )
