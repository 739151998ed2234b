"""What is asked of compiled Triton kernels, and the bounds. Each check says what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from wnkernel.backends.triton.plan import THREADS, VECTOR_BYTES, Kind, Tile, tiles
from wnkernel.backends.triton.variants import Types
from wnkernel.problem import accumulation_dtype

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

DTYPES = {
    "float32": ("float32",) * 3,
    "bfloat16": ("bfloat16",) * 3,
    "float16": ("float16",) * 3,
    "mixed": ("bfloat16", "float32", "bfloat16"),
    "autocast": ("float32", "float32", "bfloat16"),
    "float64": ("float64",) * 3,
}
"""Of v, g and w."""

REGISTERS = 128
"""Of a thread, at most. A processor of an NVIDIA GPU has 65536, so two programs of 256 threads can
share it: one computes while the other waits for memory. In AMD GPUs a processor has four units with
512 for each lane of a wave, and a program has four waves: four programs can share it."""

SPILLED_BYTES = {("cuda80", dtypes): 8 for dtypes in ("float16", "bfloat16", "mixed")}
if triton.__version__.startswith("3.6."):
    SPILLED_BYTES["gfx942", "float32"] = 20
"""Of a thread, at most, by GPU and dtypes; all others spill nothing. For sm_80 the assembler puts
some numbers aside in the kernel for long rows of halves, to stay at 48 registers: one more program
fits. For gfx942 these are scalars that are kept in a vector register, and none is in memory."""

SPILLED_IN_LISTS = {("cuda90", "float64"): 16, ("cuda80", "mixed"): 16, ("cuda100", "mixed"): 16}
SPILLED_IN_LISTS |= {("cuda100", dtypes): 8 for dtypes in ("float16", "bfloat16", "autocast")}
SPILLED_IN_LISTS["cuda100", "float64"] = 32
SPILLED_IN_LISTS["cuda80", "float64"] = 8
"""The same for lists of every tile, where that is more: to stay at 80 registers, or 64."""

ROWS, EVERY = "rows", "every tile"
"""The tiles of a list."""


class Variant(NamedTuple):
    """What was compiled."""

    types: Types
    direction: str
    of: str | int
    """The tiles of a list, or the place of a single weight's in the table of tiles."""
    finish: int
    facts: dict[str, Any]
    """From triton_offline_worker.py."""

    def __str__(self) -> str:
        tile = self.tile
        of = f"a list, {self.of}" if tile is None else f"{tile.kind.name} {tuple(tile[1:])}"
        return f"{self.direction} of {of}, launch {self.finish + 1}"

    @property
    def is_cuda(self) -> bool:
        """Whether it was compiled for NVIDIA."""
        return "tensor_loads" in self.facts

    @property
    def tile(self) -> Tile | None:
        """Of a single weight."""
        return None if isinstance(self.of, str) else tiles(self.types.v.itemsize)[self.of]

    def branches(self) -> list[Tile]:
        """The tiles of a list."""
        known = tiles(self.types.v.itemsize)
        if self.of == ROWS:
            return [tile for tile in known if tile.kind is Kind.ROWS]
        return [tile for tile in known if self.finish in finishes(tile)]

    def widths(self, accesses: str) -> Counter[int]:
        """How many loads or stores there are of how many bytes; twice the widest counts twice."""
        widths: Counter[int] = Counter()
        for width, n in self.facts[accesses].items():
            times = max(int(width) // VECTOR_BYTES, 1)
            widths[int(width) // times] += times * n
        return widths


def finishes(tile: Tile) -> tuple[int, ...]:
    """Launches that a weight cut into these may take."""
    return (0,) if tile.kind is Kind.ROWS else (0, 1)


def spilled_bytes(gpu: str, dtypes: str, v: Variant) -> int:
    """What may be spilled."""
    in_lists = SPILLED_IN_LISTS.get((gpu, dtypes), 0) if v.of == EVERY else 0
    return max(SPILLED_BYTES.get((gpu, dtypes), 0), in_lists)


def over_bounds(v: Variant, spilled_bytes: int = 0) -> Iterator[str]:
    """Too many registers, or spills of more bytes."""
    if (registers := v.facts["registers"]) > REGISTERS:
        yield f"{v}: {registers} registers, {REGISTERS} are allowed"
    if (spilled := v.facts["spilled_bytes"]) > spilled_bytes:
        yield f"{v}: {spilled} bytes spilled, {spilled_bytes} are allowed"
    if spilled == 0 and (times := v.facts.get("machine_spills")):
        yield f"{v}: {times} instructions that spill"


def needed(v: Variant, tile: Tile) -> dict[str, Counter[int]]:
    """A thread's loads and stores of v and w, or of v, grad_w and grad_v, and of how many bytes: as
    wide as can be for v, and as many elements of w. Rows over many tiles are read twice, unless
    their sums are there. A forward stores v in case that norms are forced."""
    read = [v.types.v] if v.direction == "forward" else [v.types.v, v.types.w]
    written = [v.types.v, v.types.w] if v.direction == "forward" else [v.types.v]
    times = 1 if tile.kind is Kind.ROWS or v.finish else 2
    found: dict[str, Counter[int]] = {"loads": Counter(), "stores": Counter()}
    each = *(("loads", dtype) for dtype in times * read), *(("stores", dtype) for dtype in written)
    for accesses, dtype in each:
        width = min(v.types.vector * dtype.itemsize, VECTOR_BYTES)
        found[accesses][width] += tile.lines * tile.columns // THREADS * dtype.itemsize // width
    return found


def others(v: Variant, accesses: str) -> int:
    """Elements of a thread that are loaded or stored beside tiles: of g, norms and partial sums.
    Triton's tensors say how many."""
    tile = [v.tile.lines, v.tile.columns]
    found = v.facts[f"tensor_{accesses}"]
    return sum(a["per_thread"] for a in found if a["shape"] != tile)


def wide_partial_sums(v: Variant, accesses: str) -> int:
    """16-byte accesses of a thread to the partial sums of strips, which are always aligned."""
    if v.tile.kind is not Kind.STRIPS:
        return 0
    found = v.facts[f"tensor_{accesses}"]
    elements = sum(a["per_thread"] for a in found if len(a["shape"]) == 3)
    return elements * accumulation_dtype(v.types.v).itemsize // VECTOR_BYTES


def wrong_widths(v: Variant) -> Iterator[str]:
    """Of single weights. Aligned tiles: enough wide accesses, and narrower ones only to other
    things. Others: none of 16 bytes but to partial sums, unless addresses need not be multiples of
    that (AMD)."""
    for accesses, at_least in needed(v, v.tile).items():
        widths = v.widths(accesses)
        if not v.tile.aligned:
            if v.is_cuda and (n := widths[VECTOR_BYTES] - wide_partial_sums(v, accesses)) > 0:
                yield f"{v}: {n} {accesses} of 16 bytes at addresses that may not allow them"
            continue
        yield from _too_few(v, accesses, widths, at_least)
        narrow = sum(n for width, n in widths.items() if width < min(at_least))
        if v.is_cuda and narrow > (most := others(v, accesses)):
            yield f"{v}: {narrow} narrow {accesses}, {most} have a reason"


POINTEES = {"f16": 2, "bf16": 2, "f32": 4, "f64": 8}


def false_promises(v: Variant) -> Iterator[str]:
    """Tiles start at multiples of so many elements as 16 bytes of v hold: fewer bytes of others."""
    for of, promised in v.facts["promises"]:
        most = min(v.types.vector * POINTEES[of], VECTOR_BYTES)
        if promised > most:
            yield f"{v}: addresses of {of} are said to be multiples of {promised}, not {most} bytes"


def too_narrow(v: Variant, branches: Iterable[Tile]) -> Iterator[str]:
    """A list needs what all its aligned tiles need, in NVIDIA's machine code, too."""
    counts = [needed(v, tile) for tile in branches if tile.aligned]
    for accesses in ("loads", "stores"):
        at_least: Counter[int] = sum((count[accesses] for count in counts), Counter())
        yield from _too_few(v, accesses, v.widths(accesses), at_least)
        machine = v.facts.get(f"machine_{accesses}")
        if machine is not None and machine < at_least[VECTOR_BYTES]:
            yield f"{v}: {machine} {accesses} of 16 bytes in machine code are too few"


def differences(v: Variant, singles: Iterable[Variant]) -> Iterator[str]:
    """Between a list and its tiles one by one, so that bits could differ.

    In which order a reduction adds depends on its shape, axis and layout. Triton chooses layouts,
    and may choose one in a branch of a list by what it finds in another: there have to be the same
    ones, equally often. Whether a product is rounded before it is added is LLVM's choice: as many
    have to be fused. Neither says *which* tile has which, and NVIDIA's assembler may fuse what LLVM
    left. Only a GPU can prove that bits are the same.
    """
    one_by_one: Counter[str] = Counter()
    fused = 0
    widths = {"loads": Counter(), "stores": Counter()}
    for single in singles:
        one_by_one.update(single.facts["reductions"])
        fused += single.facts["fused"]
        for accesses in widths:
            widths[accesses] += single.widths(accesses)
    in_list = Counter(v.facts["reductions"])
    for reduction, n in (one_by_one - in_list).items():
        yield f"{v}: only single weights reduce {reduction} ({n} times)"
    for reduction, n in (in_list - one_by_one).items():
        yield f"{v}: only it reduces {reduction} ({n} times)"
    # AMD's division of float64 consists of fused multiplications, and its code may be shared.
    comparable = v.is_cuda or v.types.v is not torch.float64
    if comparable and v.facts["fused"] != fused:
        yield f"{v}: {v.facts['fused']} fused multiplications, {fused} for single weights"
    for accesses in widths:
        wide = Counter({VECTOR_BYTES: widths[accesses][VECTOR_BYTES]})
        yield from _too_few(v, accesses, v.widths(accesses), wide)


def _too_few(
    v: Variant, accesses: str, widths: Counter[int], at_least: Counter[int]
) -> Iterator[str]:
    for width, n in (at_least - widths).items():
        yield f"{v}: {n} {accesses} of {width} bytes too few of {at_least[width]}"
