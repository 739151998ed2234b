"""One row of the CSV, and how rows come from a measurement: bytes, GB/s and the two ratios."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .environment import Environment
from .timing import Stats

OURS = "wnkernel"
TORCH = "torch"
"""torch's own weight norm: the operator, or the parametrization where a layer is meant."""
LEGACY = "torch legacy hook"
COPY = "copy_"
COMPILED = ", compiled"
"""What follows the name of a contender that went through torch.compile."""

ARRAYS = {"forward": 2, "forward+backward": 5, "weight norms alone": 5}
"""The least traffic of a phase in arrays of v's size. Forward: read v, write w. Backward: read v
and grad_w, write grad_v. g and the norms are small and not counted."""

COPY_ARRAYS = 2


@dataclass(frozen=True)
class Subject:
    """What is measured, apart from who does it."""

    case: str
    """``layers``, ``host``, ``compile`` or ``models``; one CSV file each."""
    label: str
    phase: str
    dtype: str
    shape: str
    dim: str
    kind: str
    """``first``, ``last``, ``middle``, ``whole``, or empty for a model."""
    numel: int
    array_bytes: int
    """The bytes of one array of v's size, over all weights."""


@dataclass(frozen=True)
class Result:
    """A row of the CSV. Floats that have no meaning for a row are NaN."""

    case: str
    label: str
    device: str
    torch: str
    commit: str
    backend: str
    threads: int
    dtype: str
    shape: str
    dim: str
    kind: str
    numel: int
    contender: str
    phase: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int
    bytes: float
    gb_per_s: float
    ratio_to_torch: float
    """torch's median divided by this one: above 1 is faster than torch."""
    ratio_to_limit: float
    """This median divided by that of an in-place ``copy_`` scaled to the same bytes: 1 is the
    limit that memory sets."""
    error: float
    """The largest relative error against float64 before timing."""
    compile_s: float
    """Seconds of the first call, for a compiled contender."""
    other_cores: float
    """Cores that other processes used while this was timed."""


NAN = float("nan")


def rows(
    subject: Subject,
    where: Environment,
    stats: Mapping[str, Stats],
    *,
    errors: Mapping[str, float] | None = None,
    compile_s: Mapping[str, float] | None = None,
) -> list[Result]:
    """One row per contender of a measurement."""
    arrays = ARRAYS.get(subject.phase)
    copy_ms = stats[COPY].median_ms if COPY in stats else NAN
    out = []
    for name, s in stats.items():
        own_arrays = COPY_ARRAYS if name == COPY else arrays
        traffic = own_arrays * subject.array_bytes if own_arrays else NAN
        limit_ms = copy_ms * own_arrays / COPY_ARRAYS if own_arrays else NAN
        out.append(
            Result(
                case=subject.case,
                label=subject.label,
                device=where.device_name,
                torch=where.torch,
                commit=where.commit,
                backend=where.backend,
                threads=where.threads,
                dtype=subject.dtype,
                shape=subject.shape,
                dim=subject.dim,
                kind=subject.kind,
                numel=subject.numel,
                contender=name,
                phase=subject.phase,
                median_ms=s.median_ms,
                p20_ms=s.p20_ms,
                p80_ms=s.p80_ms,
                rounds=s.rounds,
                bytes=traffic,
                gb_per_s=traffic / s.median_ms / 1e6,
                ratio_to_torch=NAN if name == COPY else stats[TORCH].median_ms / s.median_ms,
                ratio_to_limit=NAN if name == COPY else s.median_ms / limit_ms,
                error=(errors or {}).get(name, NAN),
                compile_s=(compile_s or {}).get(name, NAN),
                other_cores=s.other_cores,
            )
        )
    return out


def by_subject(results: Iterable[Result]) -> list[dict[str, Result]]:
    """The results of each measurement by contender."""
    groups: dict[tuple[str, ...], dict[str, Result]] = {}
    for r in results:
        key = r.case, r.label, r.phase, r.dtype, r.shape, r.dim
        groups.setdefault(key, {})[r.contender] = r
    return list(groups.values())
