"""The command line of ``make gpu-check``.

Builds what can be built, runs the tests on the GPU, compute-sanitizer where it is installed, and
the GPU benchmark. A step that fails does not stop the next. Writes ``gpu-check.log``, ``tests.xml``
and the CSV files of the benchmark. Exit status: 0 all is well, 1 a step failed, 3 there is no GPU,
4 a package is missing.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from .checks import ROOT, steps
from .steps import failed, print_outcomes, run_steps
from .summary import CASES, WIDTH, print_summary, read

NO_GPU = 3
"""The exit status."""

OUT = ROOT / "benchmarks" / "out" / "gpu"
LOG = "gpu-check.log"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder for the log and the CSV files.")] = OUT,
    limit_s: Annotated[float, typer.Option(help="Seconds for all steps together.")] = 460.0,
    skip: Annotated[list[str] | None, typer.Option(help="Not this step; repeatable.")] = None,
) -> None:
    """Check wnkernel on this machine's GPU, in under eight minutes."""
    started = time.monotonic()
    console = Console(record=True)
    if not console.is_terminal:
        console = Console(record=True, width=WIDTH)
    if why := no_gpu():
        console.print(f"gpu-check: there is no GPU here: {why}. Nothing was run.", soft_wrap=True)
        raise typer.Exit(NO_GPU)
    known = steps(out)
    names = [step.name for step in known]
    if unknown := set(skip or ()) - set(names):
        expected = ", ".join(names)
        got = ", ".join(sorted(unknown))
        raise typer.BadParameter(f"--skip: expected some of {expected}, got {got}")
    out.mkdir(parents=True, exist_ok=True)
    log = out / LOG
    log.write_text("", encoding="utf-8")
    for case in CASES:  # what an earlier run left is none of this one's results
        (out / f"{case}.csv").unlink(missing_ok=True)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    chosen = [step for step in known if step.name not in (skip or ())]
    outcomes = run_steps(chosen, ROOT, log, limit_s, say)
    print_summary(console, read(out))
    print_outcomes(console, outcomes)
    verdict = "At least one step failed" if failed(outcomes) else "All is well"
    say(f"{verdict}. Took {time.monotonic() - started:.0f} s. Log and CSV files: {out}")
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n{console.export_text()}")
    if failed(outcomes):
        raise typer.Exit(1)


def no_gpu() -> str:
    """Why there is no GPU that torch can use; empty if there is one."""
    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"this torch ({torch.__version__}) is built for CPUs only"
    return f"torch {torch.__version__} finds none (torch.cuda.is_available() is false)"
