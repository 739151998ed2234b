"""The end of a run, from its CSV file: the losses, and the figures beside their aims for a card of
the H200's class."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from ..contenders import COPY, FUSED, OURS, TORCH
from ..report import show
from ..results import NAN, Result, geometric_mean, read_csv
from ..shapes import shape_text
from .cases import RESULTS
from .plan import KEY, LARGE_BYTES
from .raw import BACKWARD, FLAGGEMS, FORWARD, ONE_PASS, is_ours, model_launches, ours
from .single import COPYING, HOST, LAUNCH, RIVAL, SINGLE
from .whole import GRAPH, STREAM, WALL, WHOLE

IN_A_GRAPH = "In a CUDA graph every launch of a list copies its table of weights, too."
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
MB = 1e6
BOTH = "both"  # Forward and backward together: the sum of their medians.
# Aims for large weights, as shares of the card's copy bandwidth (docs/gpu.md, docs/cuda.md).
SHARE, SHARE_OF_CUDA = 0.85, 0.9
# Aims in times torch: the key weights; middle dims and whole tensors; the mean and the least of all
# weights above 1 MB.
KEY_TIMES, ODD_TIMES, MEAN_TIMES, LEAST_TIMES = 8.0, 5.0, 1.8, 0.95
MOST_LIMITS = 1.3  # Aim of a fused model. The limit is its arrays at copy speed plus its launches.
HOST_BOUND = 1.5  # torch waits for the host where its wall time is this many times its device time.
# The aim for these models. Of the 11 µs that a layer takes the host, autograd itself takes 4 to 5
# to accumulate two gradients per weight, in every contender.
HOST_TIMES = 2.0


class Line(NamedTuple):
    """A line of the summary."""

    title: str
    figure: str
    aim: str = ""
    met: bool | None = None  # None if there is no aim.
    cases: int = 1


def read(folder: Path) -> list[Result]:
    """Read all rows that a run left in a folder."""
    path = folder / RESULTS
    return read_csv(path) if path.is_file() else []


class Weight:
    """All measurements of one weight in one dtype with one backend."""

    def __init__(self, about: Result) -> None:
        self.about = about
        self.array_bytes = about.numel * ITEM_BYTES[about.dtype]
        self.found: dict[tuple[str, str], Result] = {}  # By phase and contender.

    def ms(self, phase: str, who: str) -> float:
        """Return device time, for :data:`BOTH` the sum; NaN if it was not measured."""
        phases = (FORWARD, BACKWARD) if phase == BOTH else (phase,)
        return sum(r.median_ms if (r := self.found.get((p, who))) else NAN for p in phases)

    def ratio(self, phase: str, who: str, to: str = TORCH) -> float:
        """Return how many times as fast as ``to`` a contender is."""
        return self.ms(phase, to) / self.ms(phase, who)

    def shares(self, phase: str, who: str, copy_gb_per_s: float) -> tuple[float, float]:
        """Return two shares of the card's copy bandwidth. The first counts the arrays that the
        backend's plan moves, which flatters a plan whose second pass finds them in a cache. The
        second counts the two or three arrays that must move."""
        ms, r = self.ms(phase, who), self.found.get((phase, who))
        least = ONE_PASS[phase] * self.array_bytes / ms / 1e6
        return (r.gb_per_s if r else NAN) / copy_gb_per_s, least / copy_gb_per_s


def weights(results: Iterable[Result], case: str = SINGLE) -> list[Weight]:
    """Return the single weights of a run. Each backend stands alone, beside torch."""
    found: dict[tuple[str, ...], Weight] = {}
    for r in results:
        if r.case == case:
            weight = found.setdefault((r.backend, r.dtype, r.shape, r.dim), Weight(r))
            weight.found[r.phase, r.contender] = r
    return list(found.values())


def contenders(results: Iterable[Result], case: str = SINGLE) -> list[str]:
    """Return the names of ours, one per backend."""
    names = (r.contender for r in results if r.case == case)
    return list(dict.fromkeys(who for who in names if who.startswith(OURS)))


def copy_speed(results: Iterable[Result]) -> float:
    """Return the GB/s that the card reads and writes; NaN if they were not measured."""
    found = (r.gb_per_s for r in results if r.case == COPYING and r.contender == COPY)
    return max(found, default=NAN)


def launch_ms(results: Iterable[Result]) -> float:
    """Return the time of an empty kernel."""
    return min((r.median_ms for r in results if r.phase == LAUNCH), default=NAN)


def weight_lines(results: Sequence[Result], who: str) -> list[Line]:
    """Return the aims of single weights and their figures."""
    every, speed = weights(results), copy_speed(results)
    lines: list[Line] = []
    dtypes = dict.fromkeys(w.about.dtype for w in every)
    aim = SHARE_OF_CUDA if who == ours("cuda") else SHARE
    for dtype, phase in product(dtypes, (FORWARD, BACKWARD)):
        large = [w for w in every if w.about.dtype == dtype and w.array_bytes >= LARGE_BYTES]
        shares = [w.shares(phase, who, speed) for w in large]
        title = f"share of copy bandwidth, 64 MB and more, {phase}, {dtype}"
        lines += _line(title, [share for share, _ in shares], least=aim)
        lines += _line(f"{title}, of {ONE_PASS[phase]} arrays", [least for _, least in shares])
    for shape, dim in KEY:
        for w in every:
            is_it = (w.about.shape, w.about.dim) == (shape_text(shape), str(dim))
            if is_it and (total := w.ratio(BOTH, who)) > 0:
                parts = ", ".join(f"{p} {w.ratio(p, who):.1f}" for p in (FORWARD, BACKWARD))
                title = f"times torch, {w.about.shape} dim {dim}, {w.about.dtype}"
                met = total >= KEY_TIMES
                lines.append(Line(title, f"{total:.1f} ({parts})", f">= {KEY_TIMES:g}", met))
    for name, kind in (("middle dims", "middle"), ("dim None", "whole")):
        ratios = [w.ratio(BOTH, who) for w in every if w.about.kind == kind]
        lines += _line(f"times torch, {name}, {BOTH}", ratios, least=ODD_TIMES)
    for dtype, phase in product(dtypes, (FORWARD, BACKWARD, BOTH)):
        chosen = [w for w in every if w.about.dtype == dtype and w.array_bytes >= MB]
        ratios = [w.ratio(phase, who) for w in chosen]
        title = f"times torch, 1 MB and more, {dtype}, {phase}"
        lines += _line(title, ratios, least=LEAST_TIMES, mean=MEAN_TIMES)
    return lines


def _line(
    title: str, values: Iterable[float], *, least: float | None = None, mean: float | None = None
) -> list[Line]:
    """Return the geometric mean and the least of the values, if there are any."""
    values = [x for x in values if x == x]
    if not values:
        return []
    bounds = ("mean", mean), ("each", least)
    aims = [f"{what} >= {bound:g}" for what, bound in bounds if bound is not None]
    met = None
    if least is not None:
        met = min(values) >= least and (mean is None or geometric_mean(values) >= mean)
    figure = f"{geometric_mean(values):.2f}, least {min(values):.2f}"
    return [Line(title, figure, ", ".join(aims), met, len(values))]


def host_lines(results: Sequence[Result]) -> list[Line]:
    """Return the host time, which has no aim on a GPU."""
    lines: list[Line] = []
    found: dict[tuple[str, str], dict[str, list[Result]]] = {}
    for r in (r for r in results if r.case == HOST):
        found.setdefault((r.phase, r.backend), {}).setdefault(r.contender, []).append(r)
    for (phase, backend), of in found.items():
        us = {who: geometric_mean(1e3 * r.median_ms for r in rows) for who, rows in of.items()}
        for who in (w for w in of if w != TORCH):
            title = f"host, times torch, {phase}, {who}, {backend}"
            for line in _line(title, [r.ratio_to_torch for r in of[who]]):
                times = f"{us[who]:.1f} µs, torch {us.get(TORCH, NAN):.1f}"
                lines.append(line._replace(figure=f"{line.figure} ({times})"))
    return lines


def model_lines(results: Sequence[Result]) -> list[Line]:
    """Return fused models: device time beside the limit, and both times beside torch's."""
    speed, launch = copy_speed(results), launch_ms(results)
    found = [r for r in results if r.case == WHOLE]
    lines = []
    for label, backend in dict.fromkeys((r.label, r.backend) for r in found):
        of = {(r.phase, r.contender): r for r in found if (r.label, r.backend) == (label, backend)}
        name, launches = f"{label} fused, {backend}", model_launches(label, backend)
        for phase in (GRAPH, STREAM):
            if fused := of.get((phase, FUSED)):
                times = fused.median_ms / (fused.bytes / speed / 1e6 + launches * launch)
                ms = f"{fused.median_ms:.3f} ms; {fused.ratio_to_torch:.2f} x torch"
                title = f"{name}, {phase} / (five arrays + {launches} launches)"
                aim, met = f"<= {MOST_LIMITS:g}", times <= MOST_LIMITS
                lines.append(Line(title, f"{times:.2f} ({ms})", aim, met))
        fused, device = of.get((WALL, FUSED)), of.get((STREAM, TORCH))
        if fused and device:
            ratio = fused.ratio_to_torch
            figure = f"{ratio:.2f} ({fused.median_ms:.3f} ms"
            if one_by_one := of.get((WALL, OURS)):
                figure += f"; one by one {one_by_one.ratio_to_torch:.2f}"
            line = Line(f"{name}, wall time, times torch", f"{figure})")
            if of[WALL, TORCH].median_ms > HOST_BOUND * device.median_ms:
                title, met = f"{line.title} (bound by the host)", ratio >= HOST_TIMES
                line = Line(title, line.figure, f">= {HOST_TIMES:g}", met)
            lines.append(line)
    return lines


def rival_lines(results: Sequence[Result]) -> list[Line]:
    """Return FlagGems beside ours."""
    return [
        Line(f"{who}, times {FLAGGEMS}, {w.about.shape} dim {w.about.dim}, {phase}", f"{ratio:.2f}")
        for w in weights(results, RIVAL)
        for who in contenders(results, RIVAL)
        for phase in (FORWARD, BACKWARD)
        if (ratio := w.ratio(phase, who, FLAGGEMS)) == ratio
    ]


def print_summary(console: Console, results: Sequence[Result]) -> None:
    """Print the card, the named weights, figures beside aims, and losses."""
    if not results:
        console.print("Nothing was measured.")
        return
    r = results[0]
    console.print(
        f"{r.device}, torch {r.torch}, triton {r.triton or 'not installed'}, commit "
        f"{r.commit or 'unknown'}. Copy {copy_speed(results):.0f} GB/s (read and written), a "
        f"launch in a graph {1e3 * launch_ms(results):.2f} µs.",
        markup=False,
    )
    found = contenders(results)
    if not found:
        console.print("No kernels of ours were measured on single weights.")
    for who in found:
        _print_lines(console, f"Single weights, {who}", weight_lines(results, who))
    _print_lines(console, "Host time", host_lines(results))
    _print_lines(console, f"Whole models. {IN_A_GRAPH}", model_lines(results))
    _print_lines(console, FLAGGEMS, rival_lines(results))
    lost = [r for r in results if is_ours(r.contender) and r.ratio_to_torch < 1]
    if not lost:
        console.print("Where we lose to torch: nowhere in this run.")
    heads = ("case", "of", "contender", "backend", "phase", "dtype", "shape", "dim")
    rows = []
    for r in sorted(lost, key=lambda r: r.ratio_to_torch):
        about = r.case, r.label, r.contender, r.backend, r.phase, r.dtype, r.shape, r.dim
        rows.append((*about, f"{1e3 * r.median_ms:.1f}", f"{r.ratio_to_torch:.2f}"))
    title = f"Where we lose to torch: {len(lost)} measurements"
    show(console, title, (*heads, "µs", "x torch"), rows, left=len(heads))


def _print_lines(console: Console, title: str, lines: Sequence[Line]) -> None:
    verdicts = {None: "", True: "[green]met[/green]", False: "[red]missed[/red]"}
    rows = [(x.title, x.figure, x.aim, verdicts[x.met], str(x.cases)) for x in lines]
    show(console, title, ("", "figure", "aim", "", "cases"), rows, left=4)
