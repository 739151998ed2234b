"""One row of the CSV, and how rows come from a measurement: bytes, GB/s and the two ratios."""

from __future__ import annotations

import csv
import errno
import io
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, field, fields, replace
from pathlib import Path

from .environment import Environment
from .timing import Stats

OURS = "wnkernel"
TORCH = "torch"
"""torch's own weight norm: the operator, or the parametrization where a layer is meant."""
LEGACY = "torch legacy hook"
COPY = "copy_"
FUSED = "fused"
"""wnkernel after ``fuse(model)``: all weights in one launch."""
VERSION = "fused, version"
"""``fuse(model, reuse="version")``, with parameters that change in every iteration."""
UNCHANGED = "fused, version, unchanged"
"""The same with parameters that do not change, so that weights are read and not computed."""
PLAIN = "no weight norm"
"""The same model with folded weights."""
COMPILED = ", compiled"
"""What follows the name of a contender that went through torch.compile."""
GROUPED = (OURS, FUSED, VERSION, UNCHANGED, OURS + COMPILED, FUSED + COMPILED)
"""All that wnkernel computes."""

FORWARD_BACKWARD = "forward+backward"
FORWARD = "forward"
READ = "forward and reader"
"""A forward and the layer that reads w at once. A forward that is timed alone looks best when it
writes past the caches, and that is where the next layer would look."""

ARRAYS = {FORWARD: 2, READ: 3, FORWARD_BACKWARD: 5, "weight norms alone": 5}
"""The least traffic of a phase in arrays of v's size. Forward: read v, write w. Its reader: read w.
Backward: read v and grad_w, write grad_v. g and the norms are small and not counted."""

COPY_ARRAYS = 2
CONTENDER_ARRAYS = {COPY: COPY_ARRAYS, UNCHANGED: 3}
"""Contenders that do less than the phase: an unchanged group only runs its backward."""


NAN = float("nan")


@dataclass(frozen=True)
class Subject:
    """What is measured, apart from who does it."""

    case: str
    """``layers``, ``host``, ``fused`` and so on; one CSV file each."""
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

    def of_phase(self, phase: str) -> Subject:
        """The same with another phase."""
        return replace(self, phase=phase)


@dataclass(frozen=True)
class Result:
    """A row of the CSV. Floats that have no meaning for a row are NaN."""

    case: str
    label: str
    device: str
    torch: str
    triton: str = field(default="", kw_only=True)  # files from before GPUs do not have it
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
    median_ms: float = NAN
    p20_ms: float = NAN
    p80_ms: float = NAN
    rounds: int = 0
    bytes: float = NAN
    gb_per_s: float = NAN
    ratio_to_torch: float = NAN
    """torch's median divided by this one: above 1 is faster than torch."""
    ratio_to_limit: float = NAN
    """This median divided by that of an in-place ``copy_`` scaled to the same bytes: 1 is the
    limit that memory sets."""
    error: float = NAN
    """The largest relative error against float64 before timing."""
    compile_s: float = NAN
    """Seconds of the first call, for a compiled contender."""
    other_cores: float = NAN
    """Cores that other processes used while this was timed."""
    peak_bytes: float = NAN
    """Peak memory over that of the model itself. Such a row has no times, and its
    ``ratio_to_torch`` is torch's peak divided by this one."""
    faults: float = NAN
    """Page faults of a call, for each of which the system clears a page: where fresh memory costs
    any, times are those of the allocator as much as of the contender."""


def rows(
    subject: Subject,
    where: Environment,
    stats: Mapping[str, Stats],
    *,
    errors: Mapping[str, float] | None = None,
    compile_s: Mapping[str, float] | None = None,
    arrays: int | None = None,
) -> list[Result]:
    """One row per contender of a measurement of time.

    Args:
        subject: what was measured.
        where: on what.
        stats: the times of every contender.
        errors: their errors before timing.
        compile_s: the seconds of their first calls.
        arrays: the traffic of the phase, if it is not that of :data:`ARRAYS`.
    """
    if arrays is None:
        arrays = ARRAYS.get(subject.phase)
    copy_ms = stats[COPY].median_ms if COPY in stats else NAN
    torch_ms = stats[TORCH].median_ms if TORCH in stats else NAN
    out = []
    for name, s in stats.items():
        own_arrays = CONTENDER_ARRAYS.get(name, arrays)
        traffic = float(own_arrays * subject.array_bytes) if own_arrays else NAN
        limit_ms = copy_ms * own_arrays / COPY_ARRAYS if own_arrays else NAN
        row = _row(
            subject,
            where,
            name,
            median_ms=s.median_ms,
            p20_ms=s.p20_ms,
            p80_ms=s.p80_ms,
            rounds=s.rounds,
            bytes=traffic,
            gb_per_s=traffic / s.median_ms / 1e6,
            ratio_to_torch=NAN if name == COPY else torch_ms / s.median_ms,
            ratio_to_limit=NAN if name == COPY else s.median_ms / limit_ms,
            error=(errors or {}).get(name, NAN),
            compile_s=(compile_s or {}).get(name, NAN),
            other_cores=s.other_cores,
            faults=s.faults,
        )
        out.append(row)
    return out


def memory_rows(subject: Subject, where: Environment, peaks: Mapping[str, float]) -> list[Result]:
    """One row per contender of a measurement of peak memory, in bytes."""
    return [
        _row(subject, where, name, peak_bytes=peak, ratio_to_torch=peaks[TORCH] / peak)
        for name, peak in peaks.items()
    ]


def _row(subject: Subject, where: Environment, contender: str, **measured: float) -> Result:
    facts = asdict(subject)
    del facts["array_bytes"]
    return Result(
        **facts,
        device=where.device_name,
        torch=where.torch,
        triton=where.triton,
        commit=where.commit,
        backend=where.backend,
        threads=where.threads,
        contender=contender,
        **measured,
    )


def by_subject(results: Iterable[Result]) -> list[dict[str, Result]]:
    """The results of each measurement by contender."""
    groups: dict[tuple[str, ...], dict[str, Result]] = {}
    for r in results:
        key = r.case, r.label, r.phase, r.dtype, r.shape, r.dim
        groups.setdefault(key, {})[r.contender] = r
    return list(groups.values())


def write_csv(results: Iterable[Result], folder: Path) -> list[Path]:
    """One file per case, overwritten; files of cases that were not run stay as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    cases: dict[str, list[Result]] = {}
    for r in results:
        cases.setdefault(r.case, []).append(r)
    paths = []
    for case, part in cases.items():
        path = folder / f"{case}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            file.write(csv_header())
            file.writelines(map(csv_line, part))
        paths.append(path)
    return paths


def append_csv(results: Iterable[Result], path: Path) -> None:
    """Add rows to a file, which gets its header with the first ones, and bring them to the disk.

    Raises:
        OSError: they cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        text = "".join((csv_header() if before == 0 else "", *map(csv_line, results)))
        data = text.encode()
        try:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(file.fileno())
        except OSError:  # half a row would make the next ones unreadable
            with suppress(OSError):
                file.truncate(before)
            raise


def csv_header() -> str:
    """The first line of a file."""
    return _line([f.name for f in fields(Result)])


def csv_line(result: Result) -> str:
    """A row of a file."""
    return _line(map(_text, astuple(result)))


def _line(cells: Iterable[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def read_csv(path: Path) -> list[Result]:
    """What :func:`write_csv` wrote. See :func:`parse_csv`."""
    with path.open(newline="", encoding="utf-8") as file:
        return parse_csv(file, path)


def parse_csv(text: Iterable[str], path: Path) -> list[Result]:
    """Rows from the lines of a file; columns that it does not have keep their defaults.

    Raises:
        ValueError: it is no such file.
    """
    reader = csv.DictReader(text)
    lines = list(reader)
    kinds = {f.name: str(f.type) for f in fields(Result) if f.name in (reader.fieldnames or ())}
    try:
        return [
            Result(**{name: _value(kind, line[name]) for name, kind in kinds.items()})
            for line in lines
        ]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a table of results: {error}") from None


def _text(value: object) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.6g}"
    return str(value)


def _value(kind: str, text: str) -> object:
    if kind == "float":
        return float(text) if text else NAN
    return int(text) if kind == "int" else text
