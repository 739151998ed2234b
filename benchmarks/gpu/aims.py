"""Figures beside what they should reach on a card of the H200's class."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..results import COPY, FUSED, OURS, TORCH, Result
from ..summary import geometric_mean
from . import copying, hosts, single, whole
from .plan import KEY, LARGE_BYTES
from .raw import is_ours, ours
from .traffic import BACKWARD, FORWARD, ONE_PASS, model_launches

ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
MB = 1e6
BOTH = "both"
"""Forward and backward together: the sum of their medians."""

SHARE, SHARE_OF_CUDA = 0.85, 0.9
"""Of the card's copy bandwidth, for large weights (docs/gpu.md, docs/cuda.md)."""

HOST_BOUND = 1.5
"""torch waits for the host where its wall time is this many times its device time."""

HOST_TIMES = 2.0
"""The aim there. Of the 11 µs that a layer takes the host, 4 to 5 are autograd's own, which adds
two gradients up for each weight, whoever computes them."""


@dataclass(frozen=True)
class Line:
    """A line of the summary."""

    title: str
    figure: str
    aim: str = ""
    met: bool | None = None
    """None: there is no aim."""
    cases: int = 1


@dataclass(frozen=True)
class Weight:
    """All that was measured of one weight in one dtype."""

    by_phase: dict[str, dict[str, Result]]
    """Phase -> contender -> result."""

    @property
    def any(self) -> Result:
        return next(iter(next(iter(self.by_phase.values())).values()))

    @property
    def array_bytes(self) -> float:
        return self.any.numel * ITEM_BYTES[self.any.dtype]

    def ms(self, phase: str, who: str) -> float:
        """Device time; of :data:`BOTH`, the sum. NaN if it was not measured."""
        phases = (FORWARD, BACKWARD) if phase == BOTH else (phase,)
        found = [self.by_phase.get(p, {}).get(who) for p in phases]
        return sum(float("nan") if r is None else r.median_ms for r in found)

    def ratio(self, phase: str, who: str, to: str = TORCH) -> float:
        """How many times as fast as ``to``."""
        return self.ms(phase, to) / self.ms(phase, who)

    def share(self, phase: str, who: str, copy_gb_per_s: float) -> float:
        """Of the card's copy bandwidth, by the arrays that the backend's plan moves. Where the
        second of two passes finds them in a cache, that flatters."""
        r = self.by_phase.get(phase, {}).get(who)
        return float("nan") if r is None else r.gb_per_s / copy_gb_per_s

    def least_share(self, phase: str, who: str, copy_gb_per_s: float) -> float:
        """Of the card's copy bandwidth, by the two or three arrays that have to be moved."""
        return ONE_PASS[phase] * self.array_bytes / self.ms(phase, who) / 1e6 / copy_gb_per_s


def weights(results: Iterable[Result], case: str = single.CASE) -> list[Weight]:
    """The single weights of a run. Backends are measured apart, each beside torch."""
    found: dict[tuple[str, ...], Weight] = {}
    for r in results:
        if r.case == case:
            weight = found.setdefault((r.backend, r.dtype, r.shape, r.dim), Weight({}))
            weight.by_phase.setdefault(r.phase, {})[r.contender] = r
    return list(found.values())


def contenders(results: Iterable[Result], case: str = single.CASE) -> list[str]:
    """Ours, by the backend."""
    return list(
        dict.fromkeys(
            r.contender for r in results if r.case == case and r.contender.startswith(OURS)
        )
    )


def copy_speed(results: Iterable[Result]) -> float:
    """GB/s of the card, read and written; NaN if it was not measured."""
    found = [r.gb_per_s for r in results if r.case == copying.CASE and r.contender == COPY]
    return max(found, default=float("nan"))


def launch_ms(results: Iterable[Result]) -> float:
    """Of a kernel that has nothing to do."""
    found = [r.median_ms for r in results if r.phase == copying.LAUNCH]
    return min(found, default=float("nan"))


def weight_lines(results: Sequence[Result], who: str) -> list[Line]:
    """The aims that single weights have."""
    every = weights(results)
    speed = copy_speed(results)
    lines = []
    dtypes = list(dict.fromkeys(w.any.dtype for w in every))
    for dtype in dtypes:
        large = [w for w in every if w.any.dtype == dtype and w.array_bytes >= LARGE_BYTES]
        for phase in (FORWARD, BACKWARD):
            shares = _numbers(w.share(phase, who, speed) for w in large)
            if shares:
                title = f"share of copy bandwidth, 64 MB and more, {phase}, {dtype}"
                aim = SHARE_OF_CUDA if who == ours("cuda") else SHARE
                met = min(shares) >= aim
                lines.append(Line(title, _mean(shares), f"each >= {aim:g}", met, len(shares)))
                least = _numbers(w.least_share(phase, who, speed) for w in large)
                title += f", of {ONE_PASS[phase]} arrays"
                lines.append(Line(title, _mean(least), cases=len(least)))
    for shape, dim in KEY:
        text = "x".join(map(str, shape)), str(dim)
        for w in every:
            if (w.any.shape, w.any.dim) == text and w.ratio(BOTH, who) > 0:
                parts = ", ".join(f"{p} {w.ratio(p, who):.1f}" for p in (FORWARD, BACKWARD))
                total = w.ratio(BOTH, who)
                title = f"times torch, {text[0]} dim {text[1]}, {w.any.dtype}"
                lines.append(Line(title, f"{total:.1f} ({parts})", ">= 8", total >= 8))
    for title, kind in (("middle dims", "middle"), ("dim None", "whole")):
        chosen = [w for w in every if w.any.kind == kind]
        lines += _ratios(f"times torch, {title}", chosen, who, (BOTH,), least=5.0)
    chosen = [w for w in every if w.array_bytes >= MB]
    for dtype in dtypes:
        of_dtype = [w for w in chosen if w.any.dtype == dtype]
        title = f"times torch, 1 MB and more, {dtype}"
        phases = (FORWARD, BACKWARD, BOTH)
        lines += _ratios(title, of_dtype, who, phases, mean=1.8, least=0.95)
    return lines


def _ratios(
    title: str,
    chosen: Sequence[Weight],
    who: str,
    phases: Sequence[str],
    *,
    mean: float | None = None,
    least: float,
) -> list[Line]:
    lines = []
    for phase in phases:
        ratios = _numbers(w.ratio(phase, who) for w in chosen)
        if not ratios:
            continue
        figure = _mean(ratios)
        aim, met = f"each >= {least:g}", min(ratios) >= least
        if mean is not None:
            aim, met = f"mean >= {mean:g}, {aim}", met and geometric_mean(ratios) >= mean
        lines.append(Line(f"{title}, {phase}", figure, aim, met, len(ratios)))
    return lines


def host_lines(results: Sequence[Result]) -> list[Line]:
    """Host time, for which there is no aim on a GPU."""
    found = [r for r in results if r.case == hosts.CASE]
    lines = []
    for phase, backend in dict.fromkeys((r.phase, r.backend) for r in found):
        of_phase = [r for r in found if (r.phase, r.backend) == (phase, backend)]
        for who in dict.fromkeys(r.contender for r in of_phase):
            ratios = _numbers(r.ratio_to_torch for r in of_phase if r.contender == who)
            if ratios and who != TORCH:
                us = geometric_mean([1e3 * r.median_ms for r in of_phase if r.contender == who])
                torchs = [1e3 * r.median_ms for r in of_phase if r.contender == TORCH]
                figure = _mean(ratios)
                times = f"{us:.1f} µs, torch {geometric_mean(torchs):.1f}"
                title = f"host, times torch, {phase}, {who}, {backend}"
                lines.append(Line(title, f"{figure} ({times})", cases=len(ratios)))
    return lines


def model_lines(results: Sequence[Result]) -> list[Line]:
    """Fused models: device time beside the limit, and both times beside torch's."""
    speed, launch = copy_speed(results), launch_ms(results)
    found: dict[tuple[str, str], dict[str, dict[str, Result]]] = {}
    for r in results:
        if r.case == whole.CASE:
            phases = found.setdefault((r.label, r.backend), {})
            phases.setdefault(r.phase, {})[r.contender] = r
    lines = []
    for (label, backend), phases in found.items():
        name = f"{label} fused, {backend}"
        for phase in (whole.GRAPH, whole.STREAM):
            fused = phases.get(phase, {}).get(FUSED)
            if fused is not None:
                launches = model_launches(label, backend)
                limit = fused.bytes / speed / 1e6 + launches * launch
                times = fused.median_ms / limit
                figure = (
                    f"{times:.2f} ({fused.median_ms:.3f} ms; {fused.ratio_to_torch:.2f} x torch)"
                )
                title = f"{name}, {phase} / (five arrays + {launches} launches)"
                lines.append(Line(title, figure, "<= 1.3", times <= 1.3))
        wall, device = phases.get(whole.WALL, {}), phases.get(whole.STREAM, {})
        if FUSED in wall and TORCH in device:
            ratio = wall[FUSED].ratio_to_torch
            figure = f"{ratio:.2f} ({wall[FUSED].median_ms:.3f} ms"
            if OURS in wall:
                figure += f"; one by one {wall[OURS].ratio_to_torch:.2f}"
            figure += ")"
            bound = wall[TORCH].median_ms > HOST_BOUND * device[TORCH].median_ms
            title = f"{name}, wall time, times torch"
            title += " (bound by the host)" if bound else ""
            aim, met = (f">= {HOST_TIMES:g}", ratio >= HOST_TIMES) if bound else ("", None)
            lines.append(Line(title, figure, aim, met))
    return lines


def rival_lines(results: Sequence[Result], rival: str, case: str) -> list[Line]:
    """Another package beside ours."""
    lines = []
    for w in weights(results, case):
        for who in contenders(results, case):
            for phase in (FORWARD, BACKWARD):
                ratio = w.ratio(phase, who, rival)
                if ratio == ratio:
                    title = f"{who}, times {rival}, {w.any.shape} dim {w.any.dim}, {phase}"
                    lines.append(Line(title, f"{ratio:.2f}"))
    return lines


def losses(results: Iterable[Result]) -> list[Result]:
    """Everything of ours that is slower than torch, the worst first."""
    own = [r for r in results if is_ours(r.contender)]
    return sorted((r for r in own if r.ratio_to_torch < 1), key=lambda r: r.ratio_to_torch)


def _mean(ratios: Sequence[float]) -> str:
    return f"{geometric_mean(ratios):.2f}, least {min(ratios):.2f}"


def _numbers(values: Iterable[float]) -> list[float]:
    return [x for x in values if x == x]
