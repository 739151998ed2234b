"""The end of a run, from its CSV files: ``python -m benchmarks.gpu.summary folder``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..results import COPY, TORCH, Result, parse_csv
from . import flaggems
from .aims import (
    Line,
    Weight,
    contenders,
    copy_speed,
    host_lines,
    launch_ms,
    losses,
    model_lines,
    rival_lines,
    weight_lines,
    weights,
)
from .cases import RESULTS
from .plan import KEY, LARGE_BYTES
from .traffic import BACKWARD, FORWARD, ONE_PASS

IN_A_GRAPH = "In a CUDA graph every launch of a list copies its table of weights, too."

WIDTH = 150
"""Columns where there is no terminal to ask."""


def read(folder: Path) -> list[Result]:
    """All rows that a run left in a folder. The last may be half written, if it was killed."""
    path = folder / RESULTS
    if not path.is_file():
        return []
    whole_lines, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return parse_csv(whole_lines.splitlines(), path)


def print_summary(console: Console, results: Sequence[Result]) -> None:
    """The card, the named weights, figures beside aims, and what is lost."""
    if not results:
        console.print("Nothing was measured.")
        return
    r = results[0]
    console.print(
        f"{r.device}, torch {r.torch}, triton {r.triton or 'not installed'}, commit "
        f"{r.commit or 'unknown'}. Copy {copy_speed(results):.0f} GB/s (read and written), a "
        f"launch in a graph {1e3 * launch_ms(results):.2f} µs.",
        markup=False,
    )
    ours = contenders(results)
    if not ours:
        console.print("No kernels of ours were measured on single weights.")
    for who in ours:
        _print_named(console, results, who)
        _print_lines(console, f"Single weights, {who}", weight_lines(results, who))
    _print_lines(console, "Host time", host_lines(results))
    _print_lines(console, f"Whole models. {IN_A_GRAPH}", model_lines(results))
    lines = rival_lines(results, flaggems.NAME, flaggems.CASE)
    _print_lines(console, flaggems.NAME, lines)
    _print_losses(console, losses(results))


def _print_lines(console: Console, title: str, lines: Sequence[Line]) -> None:
    if not lines:
        return
    table = Table(title=title, title_justify="left", header_style="bold")
    for head in ("", "cases", "figure", "aim", ""):
        table.add_column(head, justify="right" if head == "cases" else "left")
    for line in lines:
        color = "green" if line.met else "red"
        verdict = "" if line.met is None else "met" if line.met else "missed"
        verdict = f"[{color}]{verdict}[/{color}]" if verdict else ""
        table.add_row(line.title, str(line.cases), line.figure, line.aim, verdict)
    console.print(table)


def _print_named(console: Console, results: Sequence[Result], who: str) -> None:
    """The key shapes and the large ones, each with its times."""
    key = {("x".join(map(str, shape)), str(dim)) for shape, dim in KEY}
    chosen = [
        w
        for w in weights(results)
        if any(who in found for found in w.by_phase.values())
        and (w.array_bytes >= LARGE_BYTES or (w.any.shape, w.any.dim) in key)
    ]
    if not chosen:
        return
    title = f"{who}, device time in a CUDA graph, cold L2 cache from 32 MB on"
    table = Table(title=title, title_justify="left", header_style="bold")
    for head in ("shape", "dim", "dtype"):
        table.add_column(head, no_wrap=True)
    for phase in (FORWARD, BACKWARD):
        for head in ("µs", "of copy", f"of {ONE_PASS[phase]}", "x torch", "x copy_"):
            table.add_column(f"{phase}\n{head}", justify="right")
    speed = copy_speed(results)
    for w in chosen:
        cells = [w.any.shape, w.any.dim, w.any.dtype]
        for phase in (FORWARD, BACKWARD):
            cells += _cells(w, phase, who, speed)
        table.add_row(*cells)
    console.print(table)


def _cells(w: Weight, phase: str, who: str, speed: float) -> list[str]:
    """Time, shares of the card's copy bandwidth by what the plan moves and by what has to be moved,
    ratio to torch, and to a copy of v."""
    figures = (
        (1e3 * w.ms(phase, who), ".1f"),
        (w.share(phase, who, speed), ".2f"),
        (w.least_share(phase, who, speed), ".2f"),
        (w.ratio(phase, who, TORCH), ".2f"),
        (1 / w.ratio(phase, who, COPY), ".2f"),
    )
    return ["" if x != x else format(x, form) for x, form in figures]


def _print_losses(console: Console, lost: Sequence[Result]) -> None:
    if not lost:
        console.print("Where we lose to torch: nowhere in this run.")
        return
    title = f"Where we lose to torch: {len(lost)} measurements"
    table = Table(title=title, title_justify="left", header_style="bold")
    for head in ("case", "of", "contender", "backend", "phase", "dtype", "shape", "dim"):
        table.add_column(head)
    for head in ("µs", "x torch"):
        table.add_column(head, justify="right")
    for r in lost:
        cells = (r.case, r.label, r.contender, r.backend, r.phase, r.dtype, r.shape, r.dim)
        table.add_row(*cells, f"{1e3 * r.median_ms:.1f}", f"{r.ratio_to_torch:.2f}")
    console.print(table)


if __name__ == "__main__":
    _console = Console()
    print_summary(
        _console if _console.is_terminal else Console(width=WIDTH), read(Path(sys.argv[1]))
    )
