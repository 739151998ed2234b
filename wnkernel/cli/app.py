"""The commands of the command line and their options."""

from __future__ import annotations

import csv
import enum
import io
import math
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from .. import __version__
from .. import info as facts
from ..keys import FOLDED, LEGACY, PARAMETRIZED
from . import bench as benchmark
from . import cases, report
from .convert import Request
from .convert import convert as convert_files
from .errors import EXIT_CODES, WrongUsage, printable
from .output import Advance, Outputs

app = typer.Typer(
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Checkpoints of weight-normed models, and what this machine makes of weight norm.",
    epilog=EXIT_CODES,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Force = Annotated[bool, typer.Option("--force", help="Replace files that are there.")]


class Layout(str, enum.Enum):
    """The key layouts, under their names in ``wnkernel.convert_state_dict``."""

    LEGACY = LEGACY
    PARAMETRIZED = PARAMETRIZED
    FOLDED = FOLDED


def _version(wanted: bool) -> None:
    if wanted:
        print(f"wnkernel {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Handle ``--version``, and print the help of the app if no command is named."""
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(WrongUsage.exit_code)


@app.command(epilog=EXIT_CODES)
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A checkpoint.")],
    target: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="Where to. Not needed in a dry run.")
    ] = None,
    *,
    to: Annotated[Layout, typer.Option(help="The layout wanted.")],
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print what would change, and write nothing. An OUT that exists is refused all "
            "the same, without --force.",
        ),
    ] = False,
    force: Force = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print warnings and errors only.")
    ] = False,
    eps: Annotated[
        float, typer.Option(min=0.0, help="eps of the layers, if not 0; only folding needs it.")
    ] = 0.0,
    as_json: Json = False,
) -> None:
    """Write a checkpoint with its weight norms in another key layout.

    The layouts: `parametrized`, with `parametrizations.weight.original0` and `original1`, of
    torch.nn.utils.parametrizations.weight_norm; `legacy`, with `weight_g` and `weight_v`, of
    torch.nn.utils.weight_norm; `folded`, a plain `weight`.

    Files: .pt, .pth, .bin and .ckpt of torch.save; .safetensors; *.index.json with its shards
    beside it; a name without an ending is known by its contents. IN and OUT may be of different
    formats if a dict of tensors is all there is. No code in a file is run (weights_only), and
    tensors come out on the CPU.

    Every state dict in a training checkpoint is converted, wherever it is, and all else is kept.
    Optimizer state goes by the order of parameters, and so do lists of tensors, as some EMAs have
    them. Where that is another one in the other layout, because a layer got parameters after its
    weight norm or has modules inside, both are reordered, or refused if the file does not tell how.
    Folding makes one parameter of two: they are kept, do not fit, and of an optimizer a warning
    says so.

    From safetensors to safetensors, no more than a weight norm is in memory at a time; otherwise
    what is written has to fit.

    OUT appears whole or not at all, also when the command is interrupted.
    """
    if target is None and not dry_run:
        raise WrongUsage("OUT: expected a file to write to (or --dry-run), got none")
    if not math.isfinite(eps):
        raise WrongUsage(f"--eps: expected a finite number, got {eps}")
    request = Request(source, target, to.value, eps, force, dry_run)
    shown = not (quiet or as_json)
    done = convert_files(request, lambda total: _progress(total, shown))
    if as_json:
        print(report.as_json(report.conversion_as_json(request, done)))
        return
    for warning in done.warnings:
        print(f"wnkernel: warning: {printable(warning)}", file=sys.stderr)
    if not quiet:
        report.print_conversion(request, done)


@app.command()
def info(as_json: Json = False) -> None:
    """Print what is built, what runs and why not, for every bug report."""
    content = facts()
    if as_json:
        print(report.as_json(content))
    else:
        report.print_info(content)


@app.command(epilog=EXIT_CODES)
def bench(
    shape: Annotated[
        list[str] | None, typer.Option(help="A weight, such as 512x512x3; repeatable.")
    ] = None,
    dim: Annotated[
        list[str] | None,
        typer.Option(help="none or a number; one for all shapes (0 if not given), or one each."),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option("--from", help="All weight norms of this checkpoint.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, or that of the checkpoint, if not given.")
    ] = None,
    device: Annotated[str, typer.Option(help="A torch device.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of torch.")] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="For each weight and phase.")] = 0.3,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="Write all measurements to this file too.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Time single weights on this machine: every backend that runs here, and torch's own.

    Everyone's output and gradients are compared with float64 before anything is timed; a contender
    of torch's that does not run, or is wrong, shows as "-". All take turns, and medians are shown.
    On a GPU a time is that of the device or that of the host, whichever is longer.
    """
    if dim and not shape:
        raise WrongUsage("--dim: expected a --shape that it is of, got none")
    asked = []
    if shape:
        asked = cases.of_shapes(shape, dim or ["0"], dtype)
    elif checkpoint is None:
        asked = cases.of_shapes(cases.DEFAULT_SHAPES, cases.DEFAULT_DIMS, dtype)
    where = cases.device_of(device)
    if threads is not None:
        torch.set_num_threads(threads)
    inputs = [] if checkpoint is None else [checkpoint]
    with Outputs(inputs, force=force) as outputs:
        if csv_file is not None:
            outputs.check(csv_file)
        if checkpoint is not None:
            asked += cases.of_checkpoint(checkpoint, dtype)
        results = _run(asked, where, seconds, shown=not as_json)
        rows = [report.result_as_dict(r) for r in results]
        if csv_file is not None:
            with outputs.file(csv_file, lambda _: None) as writer:
                writer.write(_csv(rows))
            outputs.commit()
    about = {
        "device": _device_name(where),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "wnkernel": __version__,
    }
    if as_json:
        print(report.as_json({**about, "results": rows}))
    else:
        report.print_bench(results, ", ".join(f"{k} {v}" for k, v in about.items()))


@contextmanager
def _bar(
    columns: tuple[ProgressColumn, ...], total: int, shown: bool, *, auto_refresh: bool = True
) -> Iterator[tuple[Progress, TaskID]]:
    """Make a progress bar, and show it on standard error if that is a terminal and ``shown``."""
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, transient=True, auto_refresh=auto_refresh)
    task = bar.add_task("", total=total)
    # A bar that nobody sees is never started: on a console that is not interactive, rich before
    # 14.3 prints an empty line at the end even if the bar is disabled.
    with bar if shown and console.is_interactive else nullcontext():
        yield bar, task


@contextmanager
def _progress(total: int, shown: bool) -> Iterator[Advance]:
    """Show how many bytes are written."""
    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with _bar(columns, total, shown) as (bar, task):
        yield lambda count: bar.advance(task, count)


def _run(
    asked: list[cases.Case], device: torch.device, seconds: float, *, shown: bool
) -> list[benchmark.Result]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    results = []
    # The bar is refreshed between cases only, because a refreshing thread would disturb the timing.
    with _bar(columns, len(asked), shown, auto_refresh=False) as (bar, task):
        for case in asked:
            bar.update(task, description=str(case))
            bar.refresh()
            results += benchmark.run(case, device, seconds)
            bar.advance(task)
    return results


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.processor() or platform.machine()})"


def _csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
