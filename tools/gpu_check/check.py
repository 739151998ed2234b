"""The command line of ``make gpu-check``.

It builds the CUDA kernels for this card, tries every kernel, measures the most important figures,
runs the tests on the GPU beside compute-sanitizer, and profiles. Less important steps follow as
long as time is left. While it runs it writes ``gpu-check.log.gz`` (every line of every step),
``results.csv``, ``tests.csv``, ``ncu.txt`` and ``summary.txt``. The exit status is 0 if all is
well, 1 if a step failed, 3 without a GPU, 4 if a package is missing.
"""

from __future__ import annotations

import io
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape

from benchmarks.environment import ROOT
from benchmarks.gpu.__main__ import OUT
from benchmarks.gpu.cases import RESULTS
from benchmarks.gpu.summary import print_summary, read
from benchmarks.report import PIPE_WIDTH, show

from . import tests_to_run, visit
from .steps import BAD, Log, Outcome, Step, failed, run_steps
from .versions import PROBLEM, Facts, facts_of

NO_GPU = 3  # The exit status.
LOG, SUMMARY = "gpu-check.log.gz", "summary.txt"
FILES = (LOG, SUMMARY, RESULTS, tests_to_run.RESULTS, visit.REPORT)
"""All files that are written: few files, in one folder."""

SKIPPED = "to be skipped"

begun = [time.monotonic()]
"""The time at which the program began. It includes imports, which are slow on a machine that has
just started."""


class Device(str, Enum):
    """The device that is checked."""

    CUDA = "cuda"
    CPU = "cpu"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder for all results.")] = OUT,
    limit_s: Annotated[float, typer.Option(help="Seconds for all steps.")] = visit.LIMIT_S,
    skip: Annotated[list[str] | None, typer.Option(help="Not this step; repeatable.")] = None,
    device: Annotated[Device, typer.Option(help="cpu: try out the visit itself.")] = Device.CUDA,
    slower: Annotated[float, typer.Option(help="All limits, and that for all, times this.")] = 1.0,
) -> None:
    """Check wnkernel on this machine's GPU, in under eight minutes."""
    started = begun[0]
    if device is Device.CUDA and (why := no_gpu()):
        print(f"gpu-check: there is no GPU here: {why}. Nothing was run.", flush=True)
        raise typer.Exit(NO_GPU)
    names = [step.name for step in visit.steps(out, Facts())]
    if unknown := set(skip or ()) - set(names):
        expected, got = ", ".join(names), ", ".join(sorted(unknown))
        raise typer.BadParameter(f"--skip: expected some of {expected}, got {got}")
    for name in FILES:  # results of an earlier run must not count as this one's
        (out / name).unlink(missing_ok=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _say(f"{out} cannot be made: {error.strerror}. Results will be on the screen only.")
    told = _Told(out, started + slower * limit_s - visit.SUMMARY_S, slower)
    try:
        (first,) = told.run([visit.versions()])
        told.facts = facts_of(first.tail)
        chosen = visit.steps(out, told.facts, device=device.value)
        told.run([replace(s, absent=SKIPPED) if s.name in (skip or ()) else s for s in chosen])
    finally:  # an interrupt also leaves the results so far
        told.end(time.monotonic() - started)
    if failed(told.outcomes):
        raise typer.Exit(1)


class _Told:
    """The outcomes so far, and the files with them."""

    def __init__(self, out: Path, deadline: float, slower: float) -> None:
        self.outcomes: list[Outcome] = []
        self.facts = Facts()
        self._out, self._deadline, self._slower = out, deadline, slower
        self._log = Log(out / LOG, _say)

    def run(self, steps: Sequence[Step]) -> list[Outcome]:
        """Run some more steps."""
        steps = [replace(step, limit_s=self._slower * step.limit_s) for step in steps]
        before = list(self.outcomes)

        def then(found: list[Outcome]) -> None:
            self.outcomes = before + found
            try:
                (self._out / SUMMARY).write_text(self._tables(), encoding="utf-8")
            except OSError as error:
                _say(f"{self._out / SUMMARY} cannot be written: {error.strerror}")

        return run_steps(steps, ROOT, self._log, self._deadline, _say, then=then)

    def end(self, seconds: float) -> None:
        """Write the tables, and one line about everything."""
        self._log.close()
        _say(self._tables())
        verdict = "At least one step failed" if failed(self.outcomes) else "All is well"
        _say(f"{verdict}. Took {seconds:.0f} s. Log and results: {self._out}")

    def _tables(self) -> str:
        console = Console(file=io.StringIO(), width=PIPE_WIDTH)
        console.print(self.facts.about, markup=False)
        try:
            print_summary(console, read(self._out))
        except Exception:  # unexpected figures must not end the check
            console.print(f"The summary failed: {traceback.format_exc()}", markup=False)
        for line in (line for o in self.outcomes for line in o.tail if line.startswith(PROBLEM)):
            console.print(line, markup=False)
        rows = []
        for o in self.outcomes:
            status = f"[red]{o.status}[/red]" if o.status in BAD else o.status
            rows.append((o.name, status, escape(o.detail), f"{o.seconds:.0f}"))
        show(console, "Steps", ("step", "", "last line", "s"), rows, left=3)
        return console.file.getvalue()


def _say(text: str) -> None:
    with suppress(OSError):  # the output may go to a full disk
        print(text, flush=True)


def no_gpu() -> str:
    """Return why torch cannot use a GPU; empty if it can."""
    if torch.cuda.is_available():
        return ""
    try:
        torch.cuda.init()
    except Exception as error:  # no driver, an old driver, or a broken one
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return f"torch {torch.__version__}: {why}"
    return f"torch {torch.__version__} finds none (torch.cuda.is_available() is false)"
