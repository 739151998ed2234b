"""Prints the tables of all cases, and plots ``fused.png``: time by the number of layers, and the
distance of whole models to the limit. Machines with a GPU may lack the packages for the plot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from .contenders import (
    BY_CASE,
    COMPILED,
    COPY,
    ENGINE,
    FOREACH,
    FUSED,
    KINDS,
    LEAST,
    OURS,
    OWN,
    PLAIN,
    READ_WRITE,
    TORCH,
    UNCHANGED,
    VERSION,
)
from .results import (
    ALONE,
    ARRAYS,
    COPY_ARRAYS,
    FORCED,
    FORCED_BACKWARD,
    FORWARD_BACKWARD,
    GAN_STEP,
    IN_PLACE,
    NORMS,
    STEP,
    Result,
    by_subject,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

COLOURS = {TORCH: "tab:red", OURS: "tab:orange", FUSED: "tab:blue", VERSION: "tab:cyan"}
COPIES = 2.5
MIB = 2**20
PIPE_WIDTH = 150  # Columns of a table if the output is no terminal.
KIND_TEXT = {"first": "dim 0", "last": "last dim", "middle": "middle dims", "whole": "whole tensor"}

Measured = Mapping[str, Result]  # The results of one measurement by contender.


def console() -> Console:
    """Return the terminal, or a console for other outputs."""
    found = Console()
    return found if found.is_terminal else Console(width=PIPE_WIDTH)


def show(
    console: Console, title: str, heads: Iterable[str], rows: Iterable[Sequence[str]], left: int = 1
) -> None:
    """Print a table, unless it has no rows. The first ``left`` columns are aligned to the left, the
    others to the right. An empty row ends a section."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for k, head in enumerate(heads):
        justify = "left" if k < left else "right"
        table.add_column(head, justify=justify, no_wrap=head in ("shape", "of", "phase"))
    for row in rows:
        if row:
            table.add_row(*row)
        else:
            table.add_section()
    if table.row_count:
        console.print(table)


def print_results(console: Console, results: Sequence[Result]) -> None:
    """Print a table per group of comparable cases."""

    def of(case: str, phase: str = "") -> list[Measured]:
        return by_subject(r for r in results if r.case == case and phase in ("", r.phase))

    phases = dict.fromkeys(r.phase for r in results if r.case == "layers")
    for phase, dtype, kind in product(phases, ("float32", "bfloat16"), KIND_TEXT):
        chosen = [m for m in of("layers", phase) if (m[OURS].dtype, m[OURS].kind) == (dtype, kind)]
        title = f"Single weights, {phase}, {dtype}, {KIND_TEXT[kind]}"
        _show_times(console, title, chosen, (OURS, TORCH))
    title = "One call of the operator, 64 elements"
    _show_times(console, title, of("operators"), (OURS, TORCH, ENGINE), 1e3)
    title = "Host cost of one layer.weight"
    _show_times(console, title, of("host"), (UNCHANGED, *KINDS), 1e3)
    names = (OURS, OURS + COMPILED, TORCH, TORCH + COMPILED)
    compiled = of("compile", FORWARD_BACKWARD)
    _show_times(console, "torch.compile, single weights", compiled, names)
    title = "Whole models, every weight on its own (ungrouped)"
    _show_times(console, title, of("models"), KINDS)
    title = "All weight norms of a model, forward and backward, a process per contender"
    _show_models(console, title, of("fused"), (TORCH, OURS, FUSED, VERSION, UNCHANGED, COPY))
    title = "The same bytes in more layers"
    _show_models(console, title, of("flat"), (TORCH, OURS, FUSED, VERSION, COPY))
    title = "torch.compile, all weight norms of a model, forward and backward, a process each"
    _show_compiled(console, title, of("compile", ALONE))
    title = "torch.compile, a training step of a whole model"
    _show_compiled(console, title, of("compile", STEP))
    _show_gan(console, {next(iter(m.values())).phase: m for m in of("gan")})
    _show_memory(console, of("memory"))
    title = f"Rows of many tensors get their norm in place; {TORCH} is the published loop"
    _show_normalize(console, title, of("normalize", IN_PLACE), READ_WRITE)
    title = (
        f"Weights of EDM2's layers in training, which write v too; {TORCH} is the published code"
    )
    forced = [*of("normalize", FORCED), *of("normalize", FORCED_BACKWARD)]
    _show_normalize(console, title, forced, LEAST)


def _show_times(
    console: Console,
    title: str,
    measured: Sequence[Measured],
    names: Iterable[str],
    per_ms: float = 1.0,
) -> None:
    """Print a row per measurement and a column per contender."""
    names = [n for n in names if any(n in m for m in measured)]
    with_phase = len({(m[OURS].label, m[OURS].shape) for m in measured}) < len(measured)
    with_limit = any(COPY in m for m in measured)
    unit = "ms" if per_ms == 1 else "µs"
    heads = ["shape", "dim", "of", *["phase"] * with_phase]
    left = len(heads)
    heads += [*(f"{name}\n{unit} [p20, p80]" for name in names), "times\ntorch"]
    if with_limit:
        heads += ["GB/s", "times the\ncopy limit", f"page faults,\n{TORCH} / ours"]
    rows = []
    for m in measured:
        r = m[OURS]
        cells = [r.shape, r.dim, r.label[:24], *[r.phase] * with_phase]
        for name in names:
            cells.append(_times(m[name], per_ms) if name in m else "")
        cells.append(speedup(r.ratio_to_torch))
        if with_limit:
            cells += [number(r.gb_per_s, 1), number(r.ratio_to_limit, 2), faults(m, r)]
        rows.append(cells)
    show(console, title, heads, rows, left)


def _times(r: Result, per_ms: float = 1.0) -> str:
    texts = [short(per_ms * x) for x in (r.median_ms, r.p20_ms, r.p80_ms)]
    return "{} [{}, {}]".format(*texts)


def _show_models(
    console: Console, title: str, measured: Sequence[Measured], names: Sequence[str]
) -> None:
    heads = ["of", "layers", "MiB of v", *(f"{name}\nms" for name in names), "torch /\nfused"]
    heads += ["fused /\n2.5 copies", "torch /\n2.5 copies", "page faults,\ntorch / fused"]
    rows = []
    for m in measured:
        r = m[FUSED]
        cells = [r.label, r.shape.split()[0], f"{m[COPY].bytes / COPY_ARRAYS / MIB:.1f}"]
        cells += [short(m[name].median_ms) if name in m else "" for name in names]
        cells += [speedup(r.ratio_to_torch), number(r.ratio_to_limit, 2)]
        rows.append([*cells, number(m[TORCH].ratio_to_limit, 2), faults(m, r)])
    show(console, title, heads, rows)


def _show_compiled(console: Console, title: str, measured: Sequence[Measured]) -> None:
    """Print a row per contender, for every model and number of threads."""
    heads = ("of", "contender", "ms", "times\ntorch", "times torch,\ncompiled")
    heads += ("times\n2.5 copies", "first call,\ns", "page\nfaults")
    rows = []
    for m in measured:
        for r in (r for who, r in m.items() if who != COPY):
            ratios = r.ratio_to_torch, m[TORCH + COMPILED].median_ms / r.median_ms
            cells = [r.label if r.contender == TORCH else "", r.contender, short(r.median_ms)]
            cells += [*map(speedup, ratios), number(r.ratio_to_limit, 2)]
            rows.append([*cells, number(r.compile_s, 1), number(r.faults, 0)])
        rows.append([])
    show(console, title, heads, rows, left=2)


def _show_gan(console: Console, phases: Mapping[str, Measured]) -> None:
    norms, steps = phases.get(NORMS), phases.get(GAN_STEP)
    if norms is None:
        return
    costs = {who: r.median_ms - norms[PLAIN].median_ms for who, r in norms.items()}
    heads = ["weight norms of", "reads and\nbackwards, ms"]
    heads += ["weight norm,\nms", "times lower\nthan torch", "page faults"]
    if steps:
        heads += ["whole step,\nms", "step, times\ntorch"]
        heads += ["weight norm's\nshare of it", "page faults\nof the step"]
    rows = []
    for who, r in norms.items():
        cost = costs[who]
        cells = [who, short(r.median_ms)]
        cells += [f"{cost:.1f}", speedup(costs[TORCH] / cost)] if who != PLAIN else ["", ""]
        cells.append(number(r.faults, 0))
        if steps:
            step = steps[who]
            cells += [short(step.median_ms), speedup(step.ratio_to_torch)]
            cells.append(f"{100 * cost / step.median_ms:.1f} %" if who != PLAIN else "")
            cells.append(number(step.faults, 0))
        rows.append(cells)
    show(console, f"A GAN step: {norms[TORCH].label}", heads, rows)
    console.print(f"Weight norm is the time of the reads and backwards less that of {PLAIN!r}.")


def _show_memory(console: Console, measured: Sequence[Measured]) -> None:
    if measured:
        first, ours = measured[0][TORCH], (OURS, FUSED, VERSION)
        mib = f"{4 * first.numel / MIB:.1f} MiB of v"
        title = f"Peak memory over that of the model, {first.label}, {mib}, in MiB"
        heads = ["phase", *measured[0], *(f"{who} /\ntorch" for who in ours)]
        rows = [
            [m[TORCH].phase, *(f"{r.peak_bytes / MIB:.1f}" for r in m.values())]
            + [_red(1 / m[who].ratio_to_torch, m[who].ratio_to_torch < 1) for who in ours]
            for m in measured
        ]
        show(console, title, heads, rows)


def _show_normalize(console: Console, title: str, measured: Sequence[Measured], limit: str) -> None:
    """Print a row per set of tensors and a column per contender. Ratios are those of the group
    where there is one."""
    names = [n for n in BY_CASE["normalize"] if any(n in m for m in measured)] + [limit]
    heads = ["of", "size", *(f"{name}\nms [p20, p80]" for name in names)]
    heads += ["best\nother\n/ ours", "ours\n/ " + limit.replace(" ", "\n")]
    heads += ["GB/s", "page faults,\ntorch / ours"]
    rows = []
    for m in measured:
        r = m.get(FUSED, m[OURS])
        phase = "" if r.phase == IN_PLACE else f"{r.phase}\n"
        cells = [f"{r.label}\n{phase}{r.dtype}, dim {r.dim}"]
        cells.append(f"{r.bytes / ARRAYS[r.phase] / MIB:.0f} MiB\n{r.shape}")
        cells += [_times(m[name]).replace(" [", "\n[") if name in m else "" for name in names]
        best = min(x.median_ms for who, x in m.items() if who not in (*OWN, limit))
        cells += [speedup(best / r.median_ms), number(r.ratio_to_limit, 2)]
        rows.append([*cells, number(r.gb_per_s, 1), faults(m, r)])
    show(console, title, heads, rows)
    if any(FOREACH in m for m in measured):
        console.print("torch's foreach functions know no dim: they scale whole tensors only.")
    if rows and limit == LEAST:
        console.print("The compiled backward of EDM2's code is wrong in torch 2.13, and not timed.")


def short(x: float) -> str:
    """Return a positive number with three digits."""
    return f"{x:.{3 if x < 1 else 2 if x < 10 else 1 if x < 100 else 0}f}"


def speedup(x: float) -> str:
    """Return a ratio as text, in red if it is below 1."""
    return _red(x, x < 1)


def _red(x: float, lost: bool) -> str:
    return f"[red]{x:.2f}[/red]" if lost else f"{x:.2f}"


def faults(m: Measured, ours: Result) -> str:
    """Return the page faults of a call, torch's and one of ours; empty if they were not counted."""
    both = [number(r.faults, 0) for r in (m[TORCH], ours)]
    return " / ".join(both) if all(both) else ""


def number(x: float, digits: int) -> str:
    """Return a number as text; empty for NaN."""
    return "" if x != x else f"{x:.{digits}f}"


def plot(folder: Path) -> Path:
    """Plot flat.csv and fused.csv, at least one of which must exist."""
    import pandas as pd
    from matplotlib.figure import Figure

    files = {draw: folder / f"{name}.csv" for name, draw in (("flat", _flat), ("fused", _fused))}
    frames = {draw: pd.read_csv(file) for draw, file in files.items() if file.exists()}
    figure = Figure((7 * len(frames), 6), layout="constrained")
    axes = figure.subplots(1, len(frames), squeeze=False)
    for axis, (draw, frame) in zip(axes[0], frames.items(), strict=True):
        draw(axis, frame)
    r = frame.iloc[0]
    figure.suptitle(
        f"wnkernel ({r.backend} backend) and torch {r.torch}: all weight norms of a model, "
        f"forward and backward, {r.device}, {r.threads} threads"
    )
    path = folder / "fused.png"
    figure.savefig(path, dpi=110)
    return path


def _flat(axis: Axes, flat: DataFrame) -> None:
    flat = flat.assign(layers=flat["shape"].str.split().str[0].astype(int)).sort_values("layers")
    for who, colour in COLOURS.items():
        part = flat[flat.contender == who]
        axis.plot(part.layers, part.median_ms, marker="o", color=colour, label=who)
        axis.fill_between(part.layers, part.p20_ms, part.p80_ms, color=colour, alpha=0.15)
    copies, limit = flat[flat.contender == COPY], f"{COPIES} copies (the limit)"
    axis.plot(copies.layers, COPIES * copies.median_ms, "--", color="black", label=limit)
    axis.set(xlabel="layers", ylabel="ms", ylim=(0, None), xlim=(0, None), title=flat.label.iloc[0])
    axis.legend()


def _fused(axis: Axes, models: DataFrame) -> None:
    models = models.assign(of=models.label + "\n" + models["shape"])
    table = models.pivot(index="of", columns="contender", values="ratio_to_limit")
    names = list(COLOURS)[::-1]
    colours = [COLOURS[who] for who in names]
    table.loc[models.of.unique()[::-1], names].plot.barh(
        ax=axis, width=0.8, color=colours, logx=True
    )
    axis.axvline(1.0, color="black", linestyle="--", linewidth=1)
    axis.set(xlabel=f"time over {COPIES} copies of v (log scale; 1 is the limit)", ylabel="")
    axis.set_title("Whole models")
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1])
