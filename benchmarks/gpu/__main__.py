"""The GPU benchmark: ``python -m benchmarks.gpu --out folder``; ``make gpu-check`` runs it too."""

from __future__ import annotations

import enum
import gc
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from ..environment import Environment, environment
from ..plan import Job
from ..results import Result, write_csv
from . import copying, flaggems, hosts, single, whole
from .graphs import use_side_stream
from .plan import REAL, TINY, GpuPlan
from .summary import WIDTH, print_summary, read

OUT = Path("benchmarks/out/gpu")


class Section(str, enum.Enum):
    """A part of the benchmark, and the name of its CSV file."""

    COPY = copying.CASE
    SINGLE = single.CASE
    HOST = hosts.CASE
    WHOLE = whole.CASE
    FLAGGEMS = flaggems.CASE


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder for the CSV files.")] = OUT,
    only: Annotated[list[Section] | None, typer.Option(help="Only this; repeatable.")] = None,
    limit_s: Annotated[float, typer.Option(help="No case is begun after this.")] = 210.0,
    device: Annotated[str, typer.Option(help="A torch device.")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="Try the program out.")] = False,
    summary: Annotated[bool, typer.Option(help="Print the summary, too.")] = True,
) -> None:
    """Weight norms on a GPU: device time inside CUDA graphs, host time apart, whole models.

    Every result is checked against float64 first. A case that fails is told and the next one
    begun; the exit status is 1 then.
    """
    deadline = time.monotonic() + limit_s
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    try:
        where = environment(device, None)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    use_side_stream(where.device)
    console.print(
        f"{where.device_name}, torch {where.torch}, triton {where.triton or 'not installed'}, "
        f"wnkernel backend {where.backend!r}, commit {where.commit or 'unknown'}",
        markup=False,
    )
    jobs = _jobs(set(only or Section), TINY if tiny else REAL, where, console)
    results, failures = run_jobs(jobs, deadline, where.device, out, console)
    if summary:
        print_summary(console, read(out))
    console.print(f"{len(results)} rows, {len(failures)} of {len(jobs)} cases failed.")
    if failures:
        raise typer.Exit(1)


def _jobs(wanted: set[Section], plan: GpuPlan, where: Environment, console: Console) -> list[Job]:
    def report(line: str) -> None:
        console.print(line, markup=False)

    jobs: list[Job] = []
    if Section.COPY in wanted:
        jobs += copying.jobs(plan, where)
    if Section.SINGLE in wanted:
        jobs += single.jobs(plan, where, report)
    if Section.WHOLE in wanted:
        jobs += whole.jobs(plan, where, report)
    if Section.HOST in wanted:
        jobs += hosts.jobs(plan, where)
    if Section.FLAGGEMS in wanted:  # last, for it takes its time
        jobs += flaggems.jobs(plan, where, report)
    return jobs


def run_jobs(
    jobs: Sequence[Job], deadline: float, device: torch.device, out: Path, console: Console
) -> tuple[list[Result], list[str]]:
    """Run jobs until the deadline, writing the CSV files after each: whatever happens, what was
    measured is there. Returns the rows, and the titles of jobs that failed."""
    started = time.monotonic()
    results: list[Result] = []
    failures: list[str] = []
    for i, job in enumerate(jobs):
        if time.monotonic() > deadline:
            left = len(jobs) - i
            console.print(f"Left out {left} of {len(jobs)} cases, from {job.title!r} on: no time.")
            break
        console.print(f"[{time.monotonic() - started:6.1f} s] {job.title}", markup=False)
        try:
            results += job.run()
        except Exception as error:  # a benchmark that stops at the first bug shows only that one
            failures.append(job.title)
            about = f"FAILED: {job.title}: {type(error).__name__}: {error}"
            console.print(about, markup=False, style="bold red")
            console.print(traceback.format_exc(), markup=False)
            del error
            gc.collect()
        if not _usable(device):
            console.print("The device reports errors for everything now; the rest is left out.")
            break
        write_csv(results, out)
    return results, failures


def _usable(device: torch.device) -> bool:
    """Whether the device still works, after freeing what the last job left in graphs' pools."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    app()
