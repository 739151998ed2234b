"""The summary of a run: every case that is lost, and geometric means beside their aims."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from rich.console import Console

from wnkernel.cli.other_work import disturbed

from .contenders import BY_CASE, COMPILED, FUSED, OURS, OWN, TORCH, UNCHANGED, VERSION
from .report import faults, number, show
from .results import (
    ALONE,
    FORWARD,
    FORWARD_BACKWARD,
    READ,
    STEP,
    Result,
    by_subject,
    geometric_mean,
)

LARGE = 1_000_000  # Above this many elements the memory limit decides; below it, call overhead.
LARGE_MODEL = 12_500_000  # The elements of a model of 50 MB.
FORGIVEN_SHARE = 0.05  # The share of cases that other work may disturb in a run to be trusted.
HOST_SHARE = {OURS: 0.6, UNCHANGED: 0.25}  # The aim of a read of ``layer.weight``, of torch's.
SLOW_TORCH = 1.5  # In times the copy limit.


@dataclass(frozen=True)
class Aim:
    """The aim of a group of cases against torch (times as fast), on two cores."""

    title: str
    belongs: str  # A query on the columns of the CSV file.
    geomean: float | None = None
    least: float | None = None
    contender: str = OURS
    limit: float | None = None  # At most this many times the copy limit, in the geometric mean.


def _layers(phase: str, dtype: str, *kinds: str) -> str:
    return f"case == 'layers' and phase == {phase!r} and dtype == {dtype!r} and kind in {kinds}"


def _compiled(who: str) -> tuple[str, None, None, str]:
    return f"case == 'compile' and phase == {ALONE!r}", None, None, who + COMPILED


_ROWS = "float32", "first", "last"
_ONE_BY_ONE = (
    f"(case == 'fused' or (case == 'models' and phase == {ALONE!r})) "
    f"and torch_to_limit > {SLOW_TORCH}"
)
_LARGE = f"case == 'fused' and numel > {LARGE_MODEL}"
_HOST = "case == 'host'"
AIMS = (
    Aim("float32, dims 0 and last", _layers(FORWARD_BACKWARD, *_ROWS), 1.25, 0.97),
    Aim("the same, forward", _layers(FORWARD, *_ROWS), 1.1, 0.95),
    Aim("the same, forward and reader", _layers(READ, *_ROWS)),
    Aim("float32, middle dims", _layers(FORWARD_BACKWARD, "float32", "middle"), 6.0),
    Aim("float32, whole tensor", _layers(FORWARD_BACKWARD, "float32", "whole"), 4.0),
    Aim("bfloat16, dims 0 and last", _layers(FORWARD_BACKWARD, "bfloat16", "first", "last"), 1.8),
    Aim("one call, 64 elements", "case == 'operators'", least=1.0),
    Aim("host cost of layer.weight", _HOST, 1 / HOST_SHARE[OURS]),
    Aim("the same, from an unchanged group", _HOST, 1 / HOST_SHARE[UNCHANGED], None, UNCHANGED),
    Aim(f"models one by one, torch over {SLOW_TORCH} limits", _ONE_BY_ONE, 1.3),
    Aim("models, training step, one by one", f"case == 'models' and phase == {STEP!r}"),
    Aim("models of 50 MB and more, one by one", _LARGE),
    Aim("the same, fused", _LARGE, contender=FUSED, limit=1.2),
    Aim("the same, fused, version", _LARGE, contender=VERSION),
    Aim("models compiled, one by one", *_compiled(OURS)),
    Aim("the same, fused", *_compiled(FUSED)),
    Aim(
        "ParallelWaveGAN, fused", "case == 'fused' and label == 'ParallelWaveGAN'", 2.0, None, FUSED
    ),
)


def print_losses(console: Console, results: Sequence[Result]) -> None:
    """Print every case in which torch is faster, the worst first. Compiled contenders of ours must
    be faster than torch's compiled and uncompiled ones, and in case "normalize" than all others."""
    found = []
    for m in by_subject(results):
        for r in (r for r in m.values() if r.rounds and r.contender in OWN):
            torch_ms = min(m[name].median_ms for name in _rivals(r) if name in m)
            found.append((torch_ms / r.median_ms, torch_ms, r, m))
    lost = sorted((f for f in found if f[0] < 1), key=lambda f: f[0])
    if not lost:
        console.print("Where we lose: nowhere in this run.")
    title = f"Where we lose: {len(lost)} of {len(found)} cases"
    heads = ("case", "phase", "contender", "dtype", "shape", "dim", "of")
    rows = []
    for ratio, torch_ms, r, m in lost:
        about = r.case, r.phase, r.contender, r.dtype, r.shape, r.dim, r.label
        times = f"{r.median_ms:.4g}", f"{torch_ms:.4g}"
        rows.append((*about, *times, f"{ratio:.2f}", faults(m, r)))
    figures = ("ms", "torch ms", "times torch", "page faults,\ntorch / ours")
    show(console, title, heads + figures, rows, left=len(heads))


def _rivals(r: Result) -> tuple[str, ...]:
    """Return the contenders of torch's that a contender of ours must be faster than."""
    if r.case == "normalize":
        return tuple(who for who in BY_CASE[r.case] if who not in OWN)
    return (TORCH, TORCH + COMPILED) if r.contender.endswith(COMPILED) else (TORCH,)


def print_summary(console: Console, results: Sequence[Result]) -> None:
    """Print the table of aims, and whether the figures can be trusted."""
    timed = [r for r in results if r.rounds]
    limits = {id(r): m[TORCH].ratio_to_limit for m in by_subject(timed) for r in m.values()}
    frame = pd.DataFrame([vars(r) for r in timed], columns=[*Result.__dataclass_fields__]).assign(
        torch_to_limit=[limits[id(r)] for r in timed]
    )
    rows = []
    for aim in AIMS:
        group = frame[frame.contender == aim.contender].query(aim.belongs)
        if not group.empty:
            mean, least = geometric_mean(group.ratio_to_torch), group.ratio_to_torch.min()
            limit = geometric_mean(group.ratio_to_limit)
            large = geometric_mean(group[group.numel > LARGE].ratio_to_limit)
            cells = [aim.title, str(len(group)), number(mean, 2), _verdict(mean, aim.geomean)]
            cells += [number(least, 2), _verdict(least, aim.least), number(limit, 2)]
            rows.append([*cells, _verdict(limit, aim.limit, at_most=True), number(large, 2)])
    heads = ("group", "cases", "geometric\nmean", "aim", "least", "aim")
    heads += ("times the copy\nlimit, all", "aim", f"over {LARGE // 10**6} M\nelements")
    show(console, f"Summary: times as fast as torch on {results[0].device}", heads, rows)
    ours = frame[frame.contender.isin(OWN)]
    bad = ours[[disturbed(r.other_cores, r.threads) for r in ours.itertuples()]]
    if len(bad) > FORGIVEN_SHARE * len(ours):
        console.print(
            f"Do not trust this run: other processes were in the way in {len(bad)} of {len(ours)} "
            f"cases (up to {bad.other_cores.max():.1f} cores; column other_cores of the CSV).",
            style="bold red",
        )


def _verdict(value: float, aim: float | None, *, at_most: bool = False) -> str:
    if aim is None:
        return ""
    met = value <= aim if at_most else value >= aim
    color, sign = "green" if met else "red", "<=" if at_most else ">="
    return f"[{color}]{sign} {aim:.2f} {'met' if met else 'missed'}[/{color}]"
