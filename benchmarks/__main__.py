"""The command line: it chooses the jobs, runs them under one progress bar and reports."""

from __future__ import annotations

import enum
import functools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import compiled, forced, fused, gan, layers, models, normalize, plan
from .environment import Environment, environment, results_folder
from .plan import Job, Plan
from .results import Result, write_csv
from .timing import ContenderError
from .verify import VerificationError

if TYPE_CHECKING:
    from rich.console import Console

OUT = Path(__file__).parent / "out"
NAMES = (
    "layers",
    "operators",
    "host",
    "fused",
    "flat",
    "gan",
    "memory",
    "compile",
    "models",
    "normalize",
)
Case = enum.Enum("Case", {name.upper(): name for name in NAMES}, type=str)
"""A part of the benchmark that `--only` can ask for."""

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@app.command()
def main(
    quick: Annotated[bool, typer.Option("--quick", help="A sample, in two minutes.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Longer samples, no limit.")] = False,
    only: Annotated[list[Case] | None, typer.Option(help="Only this case; repeatable.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the CSV files and the plot.")] = OUT,
    against: Annotated[
        Path | None,
        typer.Option(help="CSV file of an earlier run, or folder. Exit code 1: a ratio got worse."),
    ] = None,
) -> None:
    """Compare wnkernel with PyTorch's weight norms: verify against float64, then time.

    Everything runs interleaved: single weights, torch.compile and rows in place in one process,
    grouped weight norms with a process for each contender. Medians with 20th and 80th percentiles.
    """
    # These import pandas and matplotlib, which the processes of contenders do without.
    from . import report, summary
    from .against import compare, print_comparison, read_earlier, to_repeat

    started = time.perf_counter()
    console = report.console()
    if quick and full:
        raise typer.BadParameter("--quick and --full exclude each other")
    wanted = set(only or Case)
    try:
        where = environment("cpu", None)
        earlier = read_earlier(against, wanted) if against else []
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    console.print(
        f"{where.device_name}, {where.threads} threads, torch {where.torch}, "
        f"wnkernel backend {where.backend!r}, commit {where.commit}"
    )

    size = plan.QUICK if quick else plan.FULL if full else plan.DEFAULT
    notes: list[str] = []
    jobs = _jobs(wanted, size, where, notes)
    try:
        measured = _run(console, jobs, size.limit_s, notes)
        again = to_repeat(earlier, measured)
        second = _run(console, [jobs[i] for i in again], size.limit_s, notes)
    except (VerificationError, ContenderError) as error:
        console.print(f"Verification failed. {error}", style="bold red", markup=False)
        raise typer.Exit(1) from None

    results = [r for rows in measured for r in rows]
    if results:
        summary.print_losses(console, results)
        report.print_results(console, results)
        summary.print_summary(console, results)
    for note in dict.fromkeys(notes):  # notes come last, where they are seen
        console.print(note, markup=False)
    if not results:
        console.print("Nothing was measured.")
        raise typer.Exit(1 if earlier else 0)
    paths = write_csv(results, out)
    if {r.case for r in results} & {"flat", "fused"}:
        paths.append(report.plot(out))
    for path in paths:
        console.print(f"Wrote {path}")
    passed = True
    if earlier:
        comparison = compare(earlier, measured, dict(zip(again, second, strict=False)))
        print_comparison(console, comparison, earlier, results[0], against)
        passed = comparison.passed
    console.print(
        f"Took {time.perf_counter() - started:.0f} s. What is kept of this machine's results "
        f"belongs in benchmarks/results/{results_folder(where)}."
    )
    if not passed:
        raise typer.Exit(1)


def _jobs(wanted: set[Case], size: Plan, where: Environment, notes: list[str]) -> list[Job]:
    makers = {
        Case.LAYERS: layers.jobs,
        Case.OPERATORS: layers.operator_jobs,
        Case.HOST: layers.host_jobs,
        Case.FUSED: fused.jobs,
        Case.FLAT: fused.flat_jobs,
        Case.GAN: gan.jobs,
        Case.MEMORY: gan.memory_jobs,
        Case.MODELS: models.jobs,
        # The last ones, because the compiler leaves processes and caches.
        Case.NORMALIZE: lambda size, where: [
            *normalize.jobs(size, where, notes.append),
            *forced.jobs(size, where, notes.append),
        ],
        Case.COMPILE: functools.partial(compiled.jobs, report=notes.append),
    }
    if Case.MEMORY in wanted and not gan.can_measure():
        notes.append("Peak memory skipped: this system does not tell that of a process.")
        del makers[Case.MEMORY]
    if Case.MODELS in wanted and not models.available():
        notes.append("Whole models skipped: transformers is not installed.")
        del makers[Case.MODELS]
    return [job for case, make in makers.items() if case in wanted for job in make(size, where)]


def _run(
    console: Console, jobs: list[Job], limit_s: float | None, notes: list[str]
) -> list[list[Result]]:
    """Run the jobs until no time is left, and return the results of each job."""
    deadline = float("inf") if limit_s is None else time.perf_counter() + limit_s
    results: list[list[Result]] = []
    text = TextColumn("{task.description:<36}")
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Only the turns between jobs refresh, because a thread would take its share of the timed CPU.
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("", total=len(jobs))
        for i, job in enumerate(jobs):
            if time.perf_counter() > deadline:
                notes.append(
                    f"Left out {len(jobs) - i} of {len(jobs)} cases, from {job.title!r} on: the "
                    f"{limit_s:.0f} s of this run were over. Use --only, or --full for no limit."
                )
                break
            progress.update(task, description=job.title)
            progress.refresh()
            results.append(job.run())
            progress.advance(task)
    return results


if __name__ == "__main__":
    app()
