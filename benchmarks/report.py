"""Tables on the terminal; one row per measurement, one column per contender."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from .environment import Environment
from .operators import ENGINE
from .results import (
    COMPILED,
    COPY,
    FORWARD_BACKWARD,
    LEGACY,
    OURS,
    TORCH,
    UNCHANGED,
    Result,
    by_subject,
)

LAYER_GROUPS = (
    ("float32, dim 0", "float32", ("first",)),
    ("float32, last dim", "float32", ("last",)),
    ("float32, middle dims", "float32", ("middle",)),
    ("float32, whole tensor (dim=None)", "float32", ("whole",)),
    ("bfloat16, dim 0", "bfloat16", ("first",)),
    ("bfloat16, last dim", "bfloat16", ("last",)),
)


def print_header(console: Console, where: Environment) -> None:
    """Everything that the figures below depend on."""
    commit = f", commit {where.commit}" if where.commit else ""
    console.print(
        f"{where.device_name}, {where.threads} threads, torch {where.torch}, "
        f"wnkernel backend {where.backend!r}{commit}"
    )


def print_results(console: Console, results: Sequence[Result]) -> None:
    """A table per group of comparable cases, as far as every weight is computed on its own."""
    cases = {
        case: [r for r in results if r.case == case]
        for case in dict.fromkeys(r.case for r in results)
    }
    for phase in dict.fromkeys(r.phase for r in cases.get("layers", [])):
        for title, dtype, kinds in LAYER_GROUPS:
            chosen = [
                r
                for r in cases["layers"]
                if r.phase == phase and r.dtype == dtype and r.kind in kinds
            ]
            _print(console, f"Single weights, {phase}, {title}", chosen, (OURS, TORCH), "ms")
    title = "One call of the operator, 64 elements"
    _print(console, title, cases.get("operators", []), (OURS, TORCH, ENGINE), "µs")
    kinds = (OURS, TORCH, LEGACY)
    host = (UNCHANGED, *kinds)
    _print(console, "Host cost of one layer.weight", cases.get("host", []), host, "µs")
    compiled = (OURS, OURS + COMPILED, TORCH, TORCH + COMPILED)
    chosen = [r for r in cases.get("compile", []) if r.phase == FORWARD_BACKWARD]
    _print(console, "torch.compile, single weights", chosen, compiled, "ms", spread=False)
    title = "Whole models, every weight on its own (ungrouped)"
    _print(console, title, cases.get("models", []), kinds, "ms")


def _print(
    console: Console,
    title: str,
    results: Sequence[Result],
    names: Iterable[str],
    unit: str,
    *,
    spread: bool = True,
) -> None:
    measurements = by_subject(results)
    if not measurements:
        return
    names = [n for n in names if any(n in m for m in measurements)]
    with_phase = len({(m[OURS].label, m[OURS].shape) for m in measurements}) < len(measurements)
    with_phase = with_phase and len({r.phase for r in results}) > 1
    with_limit = any(COPY in m for m in measurements)
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("shape", no_wrap=True)
    table.add_column("dim")
    table.add_column("of", overflow="ellipsis", no_wrap=True, max_width=24)
    if with_phase:
        table.add_column("phase", no_wrap=True)
    for name in names:
        head = f"{name}\n{unit} [p20, p80]" if spread else f"{name}\n{unit}"
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("times\ntorch", justify="right")
    if with_limit:
        for head in ("GB/s", "times the\ncopy limit", f"page faults,\n{TORCH} / ours"):
            table.add_column(head, justify="right")
    for m in measurements:
        ours = m[OURS]
        cells = [ours.shape, ours.dim, ours.label]
        if with_phase:
            cells.append(ours.phase)
        cells += [_time(m[name], unit, spread) if name in m else "" for name in names]
        cells.append(speedup(ours.ratio_to_torch))
        if with_limit:
            cells += [number(ours.gb_per_s, 1), number(ours.ratio_to_limit, 2), faults(m, ours)]
        table.add_row(*cells)
    console.print(table)


def _time(r: Result, unit: str, spread: bool) -> str:
    scale = 1e3 if unit == "µs" else 1.0
    median, low, high = (three_digits(scale * x) for x in (r.median_ms, r.p20_ms, r.p80_ms))
    return f"{median} [{low}, {high}]" if spread else median


def three_digits(x: float) -> str:
    """A positive number, short."""
    return f"{x:.{3 if x < 1 else 2 if x < 10 else 1 if x < 100 else 0}f}"


def speedup(x: float) -> str:
    """A ratio in red where it is below 1."""
    return f"[red]{x:.2f}[/red]" if x < 1 else f"{x:.2f}"


def faults(m: Mapping[str, Result], ours: Result) -> str:
    """Page faults of a call, torch's and one of ours; nothing where they were not counted."""
    both = [number(r.faults, 0) for r in (m[TORCH], ours)]
    return " / ".join(both) if all(both) else ""


def number(x: float, digits: int) -> str:
    """Nothing for NaN."""
    return "" if x != x else f"{x:.{digits}f}"
