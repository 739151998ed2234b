"""Prints the results of the commands: tables for people, JSON for programs."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .._info import Info
from .bench import PHASES, TORCH, Result
from .cases import dim_text, dtype_text, shape_text
from .convert import Report, Request
from .errors import printable
from .other_work import disturbed

PIPE_WIDTH = 150
"""The width of tables in characters if the output is no terminal."""


def console() -> Console:
    """Return a console on standard output, with a fixed width if that is no terminal."""
    out = Console()
    return out if out.is_terminal else Console(width=PIPE_WIDTH)


def as_json(content: Any) -> str:
    """Write content as one JSON object."""
    return json.dumps(content, indent=2)


def conversion_as_json(request: Request, report: Report) -> dict[str, Any]:
    """Return a conversion as a dict for programs."""
    return {
        "input": str(request.source),
        "output": None if request.target is None else str(request.target),
        "to": request.to,
        "dry_run": request.dry_run,
        "written": [str(path) for path in report.written],
        "changes": [
            {
                "where": c.where,
                "weight": c.weight,
                "from": c.source,
                "to": c.target,
                "shape": list(c.shape),
                "dim": c.dim,
            }
            for c in report.changes
        ],
        "warnings": report.warnings,
    }


def print_conversion(request: Request, report: Report) -> None:
    """Print a conversion for people: counts and written files, in a dry run every change too."""
    out = console()
    if request.dry_run:
        out.print(_changes(report))
    kinds = Counter((c.where, c.source, c.target) for c in report.changes)
    for (where, source, target), count in kinds.items():
        part = f"{where}: " if where else ""
        norms = "weight norm" if count == 1 else "weight norms"
        line = f"{part}{count} {norms}, {source} -> {target}"
        out.print(printable(line), markup=False, soft_wrap=True)
    for path in report.written:
        out.print(printable(f"wrote {path}"), markup=False, soft_wrap=True)
    if request.dry_run:
        out.print("dry run: nothing was written")


def _changes(report: Report) -> Table:
    table = Table(header_style="bold")
    has_parts = any(c.where for c in report.changes)
    if has_parts:
        table.add_column("in", overflow="fold")
    table.add_column("weight", overflow="fold")
    table.add_column("layout", no_wrap=True)
    table.add_column("shape", no_wrap=True, justify="right")
    table.add_column("dim", no_wrap=True, justify="right")
    for c in report.changes:
        cells = [c.weight, f"{c.source} -> {c.target}", shape_text(c.shape), dim_text(c.dim)]
        cells = [c.where, *cells] if has_parts else cells
        table.add_row(*(escape(printable(cell)) for cell in cells))
    return table


def print_info(content: Info) -> None:
    """Print the facts of :func:`wnkernel.info` as a table."""
    table = Table(show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    value: Any
    for key, value in content.items():
        if key == "backends":
            for name, reasons in value.items():
                table.add_row(f"backend {name}", escape("; ".join(reasons) or "runs"))
        elif key == "limits":
            table.add_row(key, escape("; ".join(value) or "-"))
        elif key == "cpu" and value:
            for name, source in value["sources"].items():
                table.add_row(f"cpu: {name}", f"{_size(value[name])} ({source})")
        elif isinstance(value, dict):
            for name, item in value.items():
                table.add_row(f"{key}: {name}", escape(_plain(item)))
        else:
            table.add_row(key, escape(_plain(value)))
    console().print(table)


def _size(count: int) -> str:
    return f"{count / 2**20:.4g} MiB" if count >= 2**20 else f"{count / 2**10:.4g} KiB"


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "-" if value in (None, "") else str(value)


def result_as_dict(r: Result) -> dict[str, Any]:
    """Return one measurement as a dict without nesting."""
    return {
        "shape": shape_text(r.case.shape),
        "dim": dim_text(r.case.dim),
        "dtype": dtype_text(r.case.dtype),
        "layers": r.case.layers,
        "phase": r.phase,
        "contender": r.contender,
        "automatic": r.automatic,
        "median_ms": r.times.median_ms,
        "p20_ms": r.times.p20_ms,
        "p80_ms": r.times.p80_ms,
        "rounds": r.times.rounds,
        "times_torch": r.times_torch,
        "other_cores": None if math.isnan(r.times.other_cores) else r.times.other_cores,
        "error": r.error,
    }


def print_bench(results: list[Result], where: str) -> None:
    """Print a table with a row for each case and phase, and a column for each contender."""
    out = console()
    out.print(where, markup=False, soft_wrap=True)
    names = list(dict.fromkeys([TORCH, *(r.contender for r in results)]))
    table = Table(header_style="bold")
    for head in ("shape", "dim", "dtype", "layers", "phase"):
        table.add_column(head, no_wrap=True)
    for name in names:
        table.add_column(f"{name}\nms", justify="right", no_wrap=True)
    table.add_column("times torch", justify="right", no_wrap=True)
    rows: dict[tuple[Any, ...], dict[str, Result]] = {}
    for r in results:
        rows.setdefault((r.case, r.phase), {})[r.contender] = r
    for (case, phase), by_name in rows.items():
        about = [shape_text(case.shape), dim_text(case.dim), dtype_text(case.dtype)]
        cells = [_ms(by_name[name].times.median_ms) if name in by_name else "-" for name in names]
        table.add_row(*about, str(case.layers), phase, *cells, _ratio(by_name))
    out.print(table)
    if len(rows) > len(PHASES):
        for phase in PHASES:
            out.print(_total(phase, [v for (_, p), v in rows.items() if p == phase]))
    out.print('"times torch": of the backend that runs when none is asked for')
    loads = (r.times.other_cores for r in results)
    if bad := [load for load in loads if disturbed(load, torch.get_num_threads())]:
        out.print(
            f"other processes used up to {max(bad):.1f} cores meanwhile: do not "
            "believe these figures; fewer --threads may help",
            style="bold red",
        )


def _total(phase: str, rows: list[dict[str, Result]]) -> str:
    """Write the time of all layers of a phase, each one run alone."""
    ours = [next(r for r in row.values() if r.automatic) for row in rows]
    text = f"all layers, {phase}: {_ms(sum(r.case.layers * r.times.median_ms for r in ours))} ms"
    if all(TORCH in row for row in rows):
        torch_ms = sum(row[TORCH].case.layers * row[TORCH].times.median_ms for row in rows)
        text += f", torch {_ms(torch_ms)} ms"
    return text


def _ratio(row: dict[str, Result]) -> str:
    ratio = next(r.times_torch for r in row.values() if r.automatic)
    return "-" if ratio is None else f"{ratio:.2f}"


def _ms(x: float) -> str:
    return f"{x:.4f}" if x < 0.1 else f"{x:.3f}" if x < 10 else f"{x:.1f}"
