"""A row of the CSV, and how a measurement becomes rows: bytes, GB/s and the two ratios."""

from __future__ import annotations

import csv
import errno
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, field, fields, replace
from pathlib import Path

import torch

from wnkernel.cli.timing import Times

from .contenders import COPY, TORCH, UNCHANGED
from .environment import Environment
from .shapes import LayerCase, dtype_text, shape_text

FORWARD_BACKWARD = "forward+backward"
FORWARD = "forward"
# READ is a forward, and then a layer that reads w. A forward alone is fastest if it writes past the
# caches, but there the next layer would look for w.
READ = "forward and reader"
ALONE = "weight norms alone"
STEP = "training step"
GAN_STEP = "GAN step"
NORMS = "weight norms of a GAN step"
IN_PLACE = "in place"
FORCED = "forced, forward"
FORCED_BACKWARD = "forced, forward+backward"
# The least traffic of a phase in arrays of v's size. A forward reads v and writes w; its reader
# reads w; a backward reads v and grad_w and writes grad_v. g and the norms are not counted. What
# is scaled in place is read and written. A forced weight norm writes v, too.
ARRAYS = {FORWARD: 2, READ: 3, FORWARD_BACKWARD: 5, ALONE: 5}
ARRAYS |= {IN_PLACE: 2, FORCED: 3, FORCED_BACKWARD: 6}
COPY_ARRAYS = 2
CONTENDER_ARRAYS = {COPY: COPY_ARRAYS, UNCHANGED: 3}  # An unchanged group runs only its backward.
NAN = float("nan")


@dataclass(frozen=True)
class Subject:
    """The subject of a measurement, without the contender."""

    case: str  # ``layers``, ``host``, ``fused`` and so on. Each case has one CSV file.
    label: str
    phase: str
    dtype: str
    shape: str
    dim: str
    kind: str  # ``first``, ``last``, ``middle`` or ``whole``; empty for a model.
    numel: int
    array_bytes: int  # The bytes of one array of v's size, summed over all weights.

    def of_phase(self, phase: str) -> Subject:
        """Return the same subject with another phase."""
        return replace(self, phase=phase)


def of_weight(c: LayerCase, dtype: torch.dtype, case: str, phase: str) -> Subject:
    """Return the subject of a single weight."""
    about = dtype_text(dtype), shape_text(c.shape), c.dim_text, c.kind, c.numel
    return Subject(case, c.label, phase, *about, c.numel * dtype.itemsize)


def of_list(case: str, label: str, numels: Sequence[int], phase: str = ALONE) -> Subject:
    """Return the subject of a list of float32 weights with these numbers of elements."""
    layers = f"{len(numels)} layer{'s' if len(numels) > 1 else ''}"
    return Subject(case, label, phase, "float32", layers, "", "", sum(numels), 4 * sum(numels))


@dataclass(frozen=True)
class Result:
    """A row of the CSV. Floats without a meaning for a row are NaN."""

    case: str
    label: str
    device: str
    torch: str
    triton: str = field(default="", kw_only=True)  # older files lack this column
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
    ratio_to_torch: float = NAN  # torch's median divided by this one: above 1 is faster.
    # This median over the time of a ``copy_`` of as many bytes; in case "normalize", of a product
    # in place or of plain passes.
    ratio_to_limit: float = NAN
    error: float = NAN  # The largest relative error against float64, from before the timing.
    compile_s: float = NAN  # The seconds of the first call of a compiled contender.
    other_cores: float = NAN  # The cores that other processes used during the timing.
    peak_bytes: float = NAN
    """The peak memory above that of the model itself. Such a row has no times, and its
    ``ratio_to_torch`` is torch's peak divided by this one."""
    faults: float = NAN
    """The page faults of a call. For each one the system clears a page, so times with page faults
    depend as much on the allocator as on the contender."""


def rows(
    subject: Subject,
    where: Environment,
    stats: Mapping[str, Times],
    *,
    errors: Mapping[str, float] = {},
    compile_s: Mapping[str, float] = {},
    arrays: int | None = None,
    limit: str = COPY,
) -> list[Result]:
    """Return one row per contender of a measurement of time, with errors from before the timing and
    the seconds of first calls. ``arrays`` is the traffic, if it is not that of :data:`ARRAYS`.
    ``limit`` is the contender that the others are held against."""
    arrays = ARRAYS.get(subject.phase) if arrays is None else arrays
    copy_ms, torch_ms = (stats[who].median_ms if who in stats else NAN for who in (limit, TORCH))
    out = []
    for who, times in stats.items():
        own_arrays = CONTENDER_ARRAYS.get(who, arrays) or NAN
        limit_ms = copy_ms * own_arrays / (CONTENDER_ARRAYS.get(limit, arrays) or NAN)
        measured = asdict(times) | {
            "bytes": float(own_arrays * subject.array_bytes),
            "gb_per_s": own_arrays * subject.array_bytes / times.median_ms / 1e6,
            "ratio_to_torch": NAN if who == limit else torch_ms / times.median_ms,
            "ratio_to_limit": NAN if who == limit else times.median_ms / limit_ms,
            "error": errors.get(who, NAN),
            "compile_s": compile_s.get(who, NAN),
        }
        out.append(_row(subject, where, who, measured))
    return out


def memory_rows(subject: Subject, where: Environment, peaks: Mapping[str, float]) -> list[Result]:
    """Return one row per contender of a measurement of peak memory, in bytes."""
    ratios = {who: {"ratio_to_torch": peaks[TORCH] / peak} for who, peak in peaks.items()}
    return [_row(subject, where, w, {"peak_bytes": peaks[w], **r}) for w, r in ratios.items()]


def _row(s: Subject, where: Environment, who: str, measured: Mapping[str, float]) -> Result:
    facts = asdict(s) | vars(where) | measured | {"device": where.device_name, "contender": who}
    return Result(**{f.name: facts[f.name] for f in fields(Result) if f.name in facts})


def by_subject(results: Iterable[Result]) -> list[dict[str, Result]]:
    """Return the results of each measurement by contender."""
    groups: dict[tuple[str, ...], dict[str, Result]] = {}
    for r in results:
        key = r.case, r.label, r.phase, r.dtype, r.shape, r.dim
        groups.setdefault(key, {})[r.contender] = r
    return list(groups.values())


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean of all values that are not NaN; NaN if there are none."""
    logs = [math.log(x) for x in values if x == x]
    return math.exp(math.fsum(logs) / len(logs)) if logs else NAN


def csv_text(results: Iterable[Result], *, header: bool = False) -> str:
    """Return rows as lines of a CSV file."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if header:
        writer.writerow(f.name for f in fields(Result))
    for r in results:
        cells = (f"{x:.6g}" if isinstance(x, float) else x for x in astuple(r))
        writer.writerow("" if cell == "nan" else cell for cell in cells)
    return text.getvalue()


def write_csv(results: Sequence[Result], folder: Path) -> list[Path]:
    """Write one file per case, and replace an older one. Files of other cases stay unchanged."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {case: folder / f"{case}.csv" for case in dict.fromkeys(r.case for r in results)}
    for case, path in paths.items():
        text = csv_text([r for r in results if r.case == case], header=True)
        path.write_text(text, encoding="utf-8", newline="")
    return [*paths.values()]


def append_csv(results: Iterable[Result], path: Path) -> None:
    """Add rows to a file and bring them to the disk, or raise an OSError. The first rows also write
    the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        data = csv_text(results, header=before == 0).encode()
        try:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(file.fileno())
        except OSError:  # half a row would make the next ones unreadable
            with suppress(OSError):
                file.truncate(before)
            raise


def read_csv(path: Path) -> list[Result]:
    """Read the rows of a file. A last line without an end, from a run that was killed, is left out.
    Columns that the file lacks keep their defaults. Raises ValueError if it is no such file."""
    lines, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    reader = csv.DictReader(lines.splitlines())
    kinds = {"float": lambda text: float(text) if text else NAN, "int": int}
    known = [f for f in fields(Result) if f.name in (reader.fieldnames or ())]
    made = {f.name: kinds.get(str(f.type), str) for f in known}
    try:
        return [Result(**{k: make(line[k]) for k, make in made.items()}) for line in reader]
    except (TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{path}: not a table of results: {error}") from None
