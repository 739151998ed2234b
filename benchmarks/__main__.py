"""The command line: choose the jobs, run them under one progress bar, report."""

from __future__ import annotations

import enum
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import (
    compiled,
    flat,
    fused,
    gan,
    grouped_report,
    host,
    layers,
    memory,
    model_zoo,
    models,
    operators,
    plan,
    report,
    summary,
)
from .against import compare, print_comparison, read_earlier, to_repeat
from .blame import ContenderError
from .environment import Environment, environment, results_folder
from .plan import Job, Plan
from .results import Result, write_csv
from .verify import VerificationError

OUT = Path(__file__).parent / "out"
PIPE_WIDTH = 150
"""Columns of a table when there is no terminal to ask."""


class Case(str, enum.Enum):
    """A part of the benchmark that `--only` can ask for."""

    LAYERS = "layers"
    OPERATORS = "operators"
    HOST = "host"
    FUSED = "fused"
    FLAT = "flat"
    GAN = "gan"
    MEMORY = "memory"
    COMPILE = "compile"
    MODELS = "models"


app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@app.command()
def main(
    quick: Annotated[bool, typer.Option("--quick", help="A sample, in about a minute.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Longer samples, no limit.")] = False,
    only: Annotated[list[Case] | None, typer.Option(help="Only this case; repeatable.")] = None,
    device: Annotated[str, typer.Option(help="A torch device.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of torch.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the CSV files and the plot.")] = OUT,
    against: Annotated[
        Path | None,
        typer.Option(help="CSV file of an earlier run, or folder. Exit code 1: a ratio got worse."),
    ] = None,
) -> None:
    """Compare wnkernel with PyTorch's weight norms: verify against float64, then time.

    Everything runs interleaved: single weights and torch.compile in one process, grouped weight
    norms with a process for each contender. Medians with 20th and 80th percentiles.
    """
    started = time.perf_counter()
    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPE_WIDTH)
    if quick and full:
        raise typer.BadParameter("--quick and --full exclude each other")
    wanted = set(only or Case)
    try:
        where = environment(device, threads)
        earlier = read_earlier(against, wanted) if against else []
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    report.print_header(console, where)

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
        grouped_report.print_results(console, results)
        summary.print_summary(console, results, where.device)
    for note in notes:  # last, where they are seen
        console.print(note, markup=False)
    if not results:
        console.print("Nothing was measured.")
        raise typer.Exit(1 if earlier else 0)
    _write(console, results, out)
    if earlier:
        comparison = compare(earlier, measured, dict(zip(again, second, strict=False)))
        print_comparison(console, comparison, earlier, results[0], against)
    console.print(
        f"Took {time.perf_counter() - started:.0f} s. What is kept of this machine's results "
        f"belongs in benchmarks/results/{results_folder(where)}."
    )
    if earlier and not comparison.passed:
        raise typer.Exit(1)


def _jobs(wanted: set[Case], size: Plan, where: Environment, notes: list[str]) -> list[Job]:
    jobs: list[Job] = []
    if Case.LAYERS in wanted:
        jobs += layers.jobs(size, where)
    if Case.OPERATORS in wanted:
        jobs += operators.jobs(size, where)
    if Case.HOST in wanted:
        jobs += host.jobs(size, where)
    if Case.FUSED in wanted:
        jobs += fused.jobs(size, where)
    if Case.FLAT in wanted:
        jobs += flat.jobs(size, where)
    if Case.GAN in wanted:
        jobs += gan.jobs(size, where)
    if Case.MEMORY in wanted and memory.can_measure(where):
        jobs += memory.jobs(size, where)
    elif Case.MEMORY in wanted:
        notes.append("Peak memory skipped: this system does not tell that of a process.")
    with_models = model_zoo.available()
    if not with_models and Case.MODELS in wanted:
        notes.append("Whole models skipped: transformers is not installed.")
    if Case.MODELS in wanted and with_models:
        jobs += models.jobs(size, where)
    if Case.COMPILE in wanted:  # last, for the compiler leaves worker processes and caches behind
        jobs += compiled.jobs(size, where, notes.append)
    return jobs


def _run(
    console: Console, jobs: list[Job], limit_s: float | None, notes: list[str]
) -> list[list[Result]]:
    """What each job gave, up to the one for which there was no time."""
    deadline = float("inf") if limit_s is None else time.perf_counter() + limit_s
    results: list[list[Result]] = []
    columns = (
        TextColumn("{task.description:<36}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # refreshed between jobs only: a refreshing thread would take its share of what is timed
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("", total=len(jobs))
        for i, job in enumerate(jobs):
            if time.perf_counter() > deadline:
                rest = jobs[i:]
                notes.append(
                    f"Left out {len(rest)} of {len(jobs)} cases, from {rest[0].title!r} on: the "
                    f"{limit_s:.0f} s of this run were over. Use --only, or --full for no limit."
                )
                break
            progress.update(task, description=job.title)
            progress.refresh()
            results.append(job.run())
            progress.advance(task)
    return results


def _write(console: Console, results: list[Result], out: Path) -> None:
    for path in write_csv(results, out):
        console.print(f"Wrote {path}")
    measured = {r.case for r in results}
    if measured & {Case.LAYERS, Case.MODELS}:
        from .plot import plot  # matplotlib takes a second to import

        console.print(f"Wrote {plot(out)}")
    if measured & {Case.FUSED, Case.FLAT}:
        from .grouped_plot import plot

        console.print(f"Wrote {plot(out)}")


if __name__ == "__main__":
    app()
