"""The end of a run: geometric means beside what is aimed at, and every case that is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from wnkernel.cli.load import disturbed

from .results import (
    FORWARD_BACKWARD,
    FUSED,
    GROUPED,
    LEGACY,
    OURS,
    TORCH,
    UNCHANGED,
    VERSION,
    Result,
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
    most: float | None = None
    """At most this many times the copy limit, each."""


def _layers(dtype: str, *kinds: str) -> Callable[[Result], bool]:
    return lambda r: (
        r.case == "layers" and r.phase == FORWARD_BACKWARD and r.dtype == dtype and r.kind in kinds
    )


def _models(phase: str) -> Callable[[Result], bool]:
    return lambda r: r.case == "models" and r.phase == phase


def _large(r: Result) -> bool:
    return r.case == "fused" and r.numel > LARGE_MODEL


def _fused(model: str) -> Callable[[Result], bool]:
    return lambda r: r.case == "fused" and r.label == model


FORGIVEN_SHARE = 0.05
"""Of the cases may be disturbed by other processes before the run is called untrustworthy."""

HOST_SHARE = {OURS: 0.6, UNCHANGED: 0.25}
"""Aim of the host cost of ``layer.weight``: at most this share of torch's."""

AIMS = (
    Aim("float32, dims 0 and last", _layers("float32", "first", "last"), 1.25, 0.95),
    Aim("float32, middle dims", _layers("float32", "middle"), 8.0),
    Aim("float32, whole tensor", _layers("float32", "whole"), 4.0),
    Aim("bfloat16, dims 0 and last", _layers("bfloat16", "first", "last"), 1.8),
    Aim("host cost of layer.weight", lambda r: r.case == "host", 1 / HOST_SHARE[OURS]),
    Aim(
        "the same, from an unchanged group",
        lambda r: r.case == "host",
        1 / HOST_SHARE[UNCHANGED],
        contender=UNCHANGED,
    ),
    Aim("models, weight norms alone, ungrouped", _models("weight norms alone")),
    Aim("models, training step, ungrouped", _models("training step")),
    Aim("models of 50 MB and more, ungrouped", _large),
    Aim("the same, fused", _large, 1.4, contender=FUSED, limit=1.35, most=1.5),
    Aim("the same, fused, version", _large, contender=VERSION),
    Aim("EnCodec-24k, fused", _fused("EnCodec-24k"), 1.3, contender=FUSED),
    Aim("ParallelWaveGAN, fused", _fused("ParallelWaveGAN"), 3.0, contender=FUSED),
)


def print_summary(console: Console, results: Sequence[Result], device: torch.device) -> None:
    """The table of aims, the accuracy of both sides, and the table of losses."""
    if device.type != "cpu":
        console.print("The aims here are those for a CPU; python -m benchmarks.gpu has others.")
    timed = [r for r in results if r.rounds]
    ours = [r for r in timed if r.contender in GROUPED]
    table = Table(title="Summary: times as fast as torch", title_justify="left")
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
        "most",
        "aim",
    ):
        table.add_column(head, justify="left" if head == "group" else "right")
    for aim in AIMS:
        group = [r for r in ours if r.contender == aim.contender and aim.belongs(r)]
        if not group:
            continue
        ratios = [r.ratio_to_torch for r in group]
        limits = _limits(group)
        large = _limits([r for r in group if r.numel > LARGE])
        table.add_row(
            aim.title,
            str(len(group)),
            f"{geometric_mean(ratios):.2f}",
            _verdict(geometric_mean(ratios), aim.geomean),
            f"{min(ratios):.2f}",
            _verdict(min(ratios), aim.least),
            _mean(limits),
            _verdict(geometric_mean(limits), aim.limit, at_most=True),
            _mean(large),
            f"{max(limits):.2f}" if aim.most else "",
            _verdict(max(limits, default=0.0), aim.most, at_most=True),
        )
    if table.row_count:
        console.print(table)
    _print_host_share(console, ours)
    _print_errors(console, timed)
    _print_disturbance(console, ours)
    _print_losses(console, ours)


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


def _print_losses(console: Console, ours: Sequence[Result]) -> None:
    lost = sorted((r for r in ours if r.ratio_to_torch < 1), key=lambda r: r.ratio_to_torch)
    if not lost:
        console.print("Where we lose: nowhere in this run.")
        return
    table = Table(title=f"Where we lose: {len(lost)} of {len(ours)} cases", title_justify="left")
    for head in ("case", "phase", "contender", "dtype", "shape", "dim", "of"):
        table.add_column(head)
    for head in ("ms", "torch ms", "times torch"):
        table.add_column(head, justify="right")
    for r in lost:
        table.add_row(
            r.case,
            r.phase,
            r.contender,
            r.dtype,
            r.shape,
            r.dim,
            r.label,
            f"{r.median_ms:.4g}",
            f"{r.median_ms * r.ratio_to_torch:.4g}",
            f"{r.ratio_to_torch:.2f}",
        )
    console.print(table)
