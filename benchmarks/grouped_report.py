"""The tables of the cases about whole models: fused, flat, compile, gan, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from .gan import NORMS
from .gan import STEP as GAN_STEP
from .models import ALONE, STEP
from .report import faults, number, speedup, three_digits
from .results import (
    COMPILED,
    COPY,
    FUSED,
    OURS,
    PLAIN,
    TORCH,
    UNCHANGED,
    VERSION,
    Result,
    by_subject,
)

MIB = 2**20
NEAR_LIMIT = 1.2
"""Where torch is within this many times the copy limit, nobody can be much faster."""

GAN_AIM = 2.5
"""Times lower cost of all weight norms of a GAN step with reuse="version"."""


def print_results(console: Console, results: Sequence[Result]) -> None:
    """A table per case that was measured."""
    cases = {
        case: by_subject(r for r in results if r.case == case)
        for case in ("fused", "flat", "compile", "gan", "memory")
    }
    title = "All weight norms of a model, forward and backward, a process per contender"
    names = (TORCH, OURS, FUSED, VERSION, UNCHANGED, COPY)
    _print_models(console, title, cases["fused"], names)
    _print_slower(console, cases["fused"])
    title = "The same bytes in more layers"
    _print_models(console, title, cases["flat"], (TORCH, OURS, FUSED, VERSION, COPY))
    title = "torch.compile, all weight norms of a model, forward and backward, a process each"
    _print_compiled(console, title, [m for m in cases["compile"] if m[OURS].phase == ALONE])
    title = "torch.compile, a training step of a whole model"
    _print_compiled(console, title, [m for m in cases["compile"] if m[OURS].phase == STEP])
    _print_gan(console, cases["gan"])
    _print_memory(console, cases["memory"])


def _print_models(
    console: Console, title: str, measured: Sequence[Mapping[str, Result]], names: Sequence[str]
) -> None:
    if not measured:
        return
    table = _table(title, ("of", "layers", "MiB of v"))
    for name in names:
        table.add_column(f"{name}\nms", justify="right")
    for head in (
        "torch /\nfused",
        "fused /\n2.5 copies",
        "torch /\n2.5 copies",
        "page faults,\ntorch / fused",
    ):
        table.add_column(head, justify="right")
    for m in measured:
        fused = m[FUSED]
        table.add_row(
            fused.label,
            fused.shape.split()[0],
            f"{m[COPY].bytes / 2 / MIB:.1f}",
            *(three_digits(m[name].median_ms) if name in m else "" for name in names),
            speedup(fused.ratio_to_torch),
            number(fused.ratio_to_limit, 2),
            number(m[TORCH].ratio_to_limit, 2),
            faults(m, fused),
        )
    console.print(table)


def _print_slower(console: Console, measured: Sequence[Mapping[str, Result]]) -> None:
    """Where a group is slower than torch, and whether torch leaves any room there."""
    slower = [m for m in measured if m[FUSED].ratio_to_torch < 1]
    for m in slower:
        limit = m[TORCH].ratio_to_limit
        near = f"within {NEAR_LIMIT} of the limit" if limit <= NEAR_LIMIT else "not near the limit"
        console.print(
            f"Fused is slower than torch on {m[FUSED].label}: {m[FUSED].ratio_to_torch:.2f} times "
            f"as fast. torch is at {limit:.2f} times the copy limit ({near})."
        )


def _print_compiled(console: Console, title: str, measured: Sequence[Mapping[str, Result]]) -> None:
    """A row per contender, for every model and number of threads."""
    if not measured:
        return
    table = _table(title, ("of",))
    table.add_column("contender")
    for head in (
        "ms",
        "times\ntorch",
        "times torch,\ncompiled",
        "times\n2.5 copies",
        "first call,\ns",
        "page\nfaults",
    ):
        table.add_column(head, justify="right")
    for m in measured:
        names = [name for name in m if name != COPY]
        for name in names:
            r = m[name]
            table.add_row(
                r.label if name == TORCH else "",
                name,
                three_digits(r.median_ms),
                speedup(r.ratio_to_torch),
                speedup(m[TORCH + COMPILED].median_ms / r.median_ms),
                number(r.ratio_to_limit, 2),
                number(r.compile_s, 1),
                number(r.faults, 0),
                end_section=name == names[-1],
            )
    console.print(table)


def _print_gan(console: Console, measured: Sequence[Mapping[str, Result]]) -> None:
    phases = {next(iter(m.values())).phase: m for m in measured}
    norms, steps = phases.get(NORMS), phases.get(GAN_STEP)
    if norms is None:
        return
    table = _table(f"A GAN step: {norms[TORCH].label}", ("weight norms of",))
    heads = ["reads and\nbackwards, ms", "weight norm,\nms", "times lower\nthan torch"]
    if steps:
        heads += ["whole step,\nms", "step, times\ntorch", "weight norm's\nshare of it"]
    for head in heads:
        table.add_column(head, justify="right")
    for name, r in norms.items():
        cost = r.median_ms - norms[PLAIN].median_ms
        cells = [name, three_digits(r.median_ms)]
        cells += [f"{cost:.1f}", speedup(_cost(norms, TORCH) / cost)] if name != PLAIN else ["", ""]
        if steps:
            step = steps[name]
            cells += [three_digits(step.median_ms), speedup(step.ratio_to_torch)]
            cells.append(f"{100 * cost / step.median_ms:.1f} %" if name != PLAIN else "")
        table.add_row(*cells)
    console.print(table)
    ratio = _cost(norms, TORCH) / _cost(norms, VERSION)
    verdict = "met" if ratio >= GAN_AIM else "missed"
    console.print(
        f"Weight norm is the time of the reads and backwards less that of {PLAIN!r}. With "
        f"reuse='version' it is {ratio:.2f} times lower than torch's (aim: {GAN_AIM}, {verdict})."
    )


def _cost(norms: Mapping[str, Result], who: str) -> float:
    return norms[who].median_ms - norms[PLAIN].median_ms


def _print_memory(console: Console, measured: Sequence[Mapping[str, Result]]) -> None:
    if not measured:
        return
    first = measured[0][TORCH]
    mib = 4 * first.numel / MIB
    title = f"Peak memory over that of the model, {first.label}, {mib:.1f} MiB of v, in MiB"
    table = _table(title, ("phase",))
    names = list(measured[0])
    for name in names:
        table.add_column(name, justify="right")
    for name in (OURS, FUSED, VERSION):
        table.add_column(f"{name} /\ntorch", justify="right")
    for m in measured:
        table.add_row(
            m[TORCH].phase,
            *(f"{m[name].peak_bytes / MIB:.1f}" for name in names),
            *(_more(1 / m[name].ratio_to_torch) for name in (OURS, FUSED, VERSION)),
        )
    console.print(table)


def _more(ratio: float) -> str:
    return f"[red]{ratio:.2f}[/red]" if ratio > 1 else f"{ratio:.2f}"


def _table(title: str, heads: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    for i, head in enumerate(heads):
        table.add_column(head, no_wrap=True, justify="right" if i else "left")
    return table
