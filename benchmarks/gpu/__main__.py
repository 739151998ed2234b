"""The GPU benchmark: ``python -m benchmarks.gpu --out folder``; ``make gpu-check`` runs it too."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from wnkernel.backends import BACKENDS

from ..environment import ROOT
from ..report import console
from .cases import Request, Section, measure
from .plan import Part
from .summary import print_summary, read

OUT = ROOT / "benchmarks" / "out" / "gpu"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder for the CSV file, which is added to.")] = OUT,
    only: Annotated[list[Section] | None, typer.Option(help="Only this; repeatable.")] = None,
    part: Annotated[list[Part] | None, typer.Option(help="Only this; repeatable.")] = None,
    backend: Annotated[str, typer.Option(help="Of ours; by default the automatic choice.")] = "",
    limit_s: Annotated[float, typer.Option(help="No case is begun after this.")] = 210.0,
    device: Annotated[str, typer.Option(help="A torch device.")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="Try the program out.")] = False,
    summary: Annotated[bool, typer.Option(help="Print the summary, too.")] = True,
) -> None:
    """Weight norms on a GPU: device time inside CUDA graphs, host time apart, whole models.

    Every result is checked against float64 first. A contender that fails is told and left out of
    its case, a process that dies is started again; the exit status is 1 then.
    """
    if backend and backend not in BACKENDS:
        expected = ", ".join(BACKENDS)
        raise typer.BadParameter(f"--backend: expected one of {expected}, got {backend!r}")
    deadline = time.monotonic() + limit_s
    screen = console()

    def say(line: str) -> None:
        screen.print(line, markup=False, highlight=False, soft_wrap=True)

    rows, failures = 0, list[str]()
    sections = tuple(only or Section)
    for one in part or Part:
        request = Request(device, backend, one, sections, tiny, out.resolve(), deadline)
        tally = measure(request, say)
        if tally.refused:
            raise typer.BadParameter(tally.refused)
        rows, failures = rows + tally.rows, failures + tally.failures
        if tally.left_out:
            late = f"no time was left for {tally.left_out!r} and what follows"
            failures += [late] * (one is Part.KEY)
            say(late)
    if summary:
        print_summary(screen, read(out))
    say("; ".join([f"{rows} rows, {len(failures)} failures", *failures]))
    if failures:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
