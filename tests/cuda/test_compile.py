"""What nvcc makes of the CUDA kernels, for GPUs that need not be there: registers, spills, and
accesses of 16 bytes.

Some types and architectures only; all of them with WNKERNEL_OFFLINE_ALL=1 in the environment.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path

import pytest

from .compiler import SOURCES, Kernel, compile_kernels, find_tool

NVCC, CUOBJDUMP = find_tool("nvcc"), find_tool("cuobjdump")
pytestmark = pytest.mark.skipif(
    NVCC is None or CUOBJDUMP is None, reason="nvcc or cuobjdump was not found"
)

ELEMENT_BYTES = {
    "f32": (4, 4),
    "bf16": (2, 2),
    "f16": (2, 2),
    "f64": (8, 8),
    "f32_bf16": (4, 2),
    "f32_f16": (4, 2),
}
"""Of v and w, by the names of csrc/cuda/types_*.cu."""

CHOSEN = [("f32", "sm_80"), ("bf16", "sm_90"), ("f32_bf16", "sm_100")]
if os.environ.get("WNKERNEL_OFFLINE_ALL"):
    CHOSEN = list(product(ELEMENT_BYTES, ("sm_80", "sm_90", "sm_100")))

REGISTERS = {2: 128, 3: 80}
"""Of a thread, at most, where so many blocks of 256 threads are to share a processor."""

KERNELS = 18
"""Of a pair of types: two directions, and for each rows or tiles alone, lists of rows or of all in
two sizes, and the second launch alone and of lists in two sizes."""

VECTORS = 4
"""Of a thread, on their way at a time."""


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[..., list[Kernel]]:
    """Compiles one source."""

    def compiled(types: str, arch: str, *flags: str, sources: Path = SOURCES) -> list[Kernel]:
        source = sources / f"types_{types}.cu"
        return compile_kernels(NVCC, CUOBJDUMP, source, arch, tmp_path, *flags)

    return compiled


def sharing(k: Kernel, types: str) -> int:
    """Blocks that are to share a processor."""
    forward, alone = k.direction == "forward", k.lines == 1
    if k.of == "rows":
        return 3 if (forward and (alone or types != "f64")) or (alone and types == "f32") else 2
    return 3 if k.of == "tiles" and alone and (forward or types != "f64") else 2


def over_bounds(kernels: Iterable[Kernel], types: str) -> list[str]:
    """Too many registers, or spills."""
    found = []
    for k in kernels:
        if k.registers > REGISTERS[sharing(k, types)] or k.blocks_of_processor < sharing(k, types):
            found.append(f"{k}: {k.registers} registers")
        spills = {what: n for what, n in k.accesses.items() if what[:3] in ("LDL", "STL")}
        if k.stack_bytes or k.local_bytes or spills:
            found.append(f"{k}: {k.stack_bytes} bytes of stack, {k.local_bytes} local, {spills}")
    return found


def too_narrow(kernels: Iterable[Kernel], types: str) -> list[str]:
    """Fewer wide accesses than the vectors of the branches come to. Branches of rows hold 4 rows of
    a vector, a row of 4, and one of 8 (not of halves); tiles, runs and strips of them, are read
    twice, in the second launch once."""
    v, w = ELEMENT_BYTES[types]
    of_rows = VECTORS + VECTORS + (0 if v == 2 else 2 * VECTORS)
    found = []
    for k in kernels:
        vectors = {"rows": of_rows, "tiles": 2 * VECTORS, "all": of_rows + 2 * VECTORS}[k.of]
        reads = vectors if k.finish or k.of == "rows" else vectors + 2 * VECTORS
        if v == 2 and k.direction == "backward" and k.of != "rows":
            halved = 2 * VECTORS  # half as many are on their way, twice
            vectors, reads = vectors - halved // 2, reads - halved // (2 if k.finish else 1)
        backward = k.direction == "backward"
        needed = {f"LDG {16}": reads, f"STG {16 if backward else 16 * w // v}": vectors}
        if backward:
            needed["LDG 16" if v == w else f"LDG {16 * w // v}"] = reads * (2 if v == w else 1)
        found += [
            f"{k}: {k.accesses[what]} {what}, {n} are needed"
            for what, n in needed.items()
            if k.accesses[what] < n
        ]
    return found


def asked_late(kernels: Iterable[Kernel]) -> list[str]:
    """Loads of g between a sum over threads and the store that follows it. Of float32 weights they
    are the only ones of two bytes, in case that g is of a half type."""
    found = []
    for k in kernels:
        waited = False
        for what in k.code:
            waited = what in ("SHFL", "BAR") or (waited and not what.startswith("STG"))
            if waited and what == "LDG 2":
                found.append(f"{k}: g is asked for late")
                break
    return found


@pytest.mark.parametrize(("types", "arch"), CHOSEN)
def test_kernels_keep_their_bounds(compiled, types, arch):
    kernels = compiled(types, arch)
    assert len(kernels) == KERNELS
    faults = over_bounds(kernels, types) + too_narrow(kernels, types)
    if types == "f32":
        faults += asked_late(kernels)
    assert not faults, "\n".join(faults)


ONE_KERNEL = """
#include "kernels.cuh"
template __global__ void wnkernel::cuda::weight_norm_kernel<
    wnkernel::cuda::BackwardLine, float, float, 1, wnkernel::cuda::kTiles, false>(
    const wnkernel::cuda::Table<wnkernel::cuda::BackwardLine, 1> __grid_constant__);
"""


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[str, str, str], Path]:
    """A copy of the sources with one line of a file replaced, and one kernel."""

    def changed(file: str, line: str, by: str) -> Path:
        sources = shutil.copytree(SOURCES.parent, tmp_path / "csrc") / SOURCES.name
        text = (sources / file).read_text()
        assert line in text
        (sources / file).write_text(text.replace(line, by))
        (sources / "types_f32.cu").write_text(ONE_KERNEL)
        return sources

    return changed


def test_spills_are_found(compiled, changed):
    sources = changed("kernels.cuh", "? 3 : 2;\n}", "? 8 : 2;\n}")
    (kernel,) = compiled("f32", "sm_90", sources=sources)
    assert over_bounds([kernel], "f32")


def test_accesses_of_single_elements_are_found(compiled, changed):
    by = "for (int k = 0; k < N; ++k) v.x[k] = p[k];"
    sources = changed("elements.cuh", "memcpy(&v, &word, sizeof(word));", by)
    (kernel,) = compiled("f32", "sm_90", sources=sources)
    assert too_narrow([kernel], "f32")


def test_loads_of_g_after_a_sum_are_found(compiled, changed):
    early = "if (tiles.owns_row()) g = load_held<Sum>(line.g, line.g_type, tiles.row());"
    late = "if (tiles.owns_row()) {\n    const auto f"
    sources = changed("forward_tiles.cuh", early, "")
    file = sources / "forward_tiles.cuh"
    text = file.read_text()
    assert late in text
    file.write_text(text.replace(late, f"{early}\n  {late}"))
    source = sources / "types_f32.cu"
    source.write_text(ONE_KERNEL.replace("Backward", "Forward"))
    (kernel,) = compiled("f32", "sm_90", sources=sources)
    assert asked_late([kernel])
