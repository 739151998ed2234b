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

from .cuda_compiler import SOURCES, Kernel, compile_kernels, find_tool

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

REGISTERS, REGISTERS_OF_TILES = 128, 80
"""Of a thread, at most: two blocks of 256 threads share a processor, and three of tiles alone."""

KERNELS = 12
"""Of a pair of types: two directions, and for each rows or tiles alone, lists of rows or of all,
and the second launch alone and of lists."""

VECTORS = 4
"""Of a thread, on their way at a time."""


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[..., list[Kernel]]:
    """Compiles one source."""

    def compiled(types: str, arch: str, *flags: str, sources: Path = SOURCES) -> list[Kernel]:
        source = sources / f"types_{types}.cu"
        return compile_kernels(NVCC, CUOBJDUMP, source, arch, tmp_path, *flags)

    return compiled


def over_bounds(kernels: Iterable[Kernel]) -> list[str]:
    """Too many registers, or spills."""
    found = []
    for k in kernels:
        alone = k.of == "tiles" and not k.is_list
        if k.registers > (REGISTERS_OF_TILES if alone else REGISTERS):
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


@pytest.mark.parametrize(("types", "arch"), CHOSEN)
def test_kernels_keep_their_bounds(compiled, types, arch):
    kernels = compiled(types, arch)
    assert len(kernels) == KERNELS
    faults = over_bounds(kernels) + too_narrow(kernels, types)
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
    sources = changed("kernels.cuh", "? 3 : 2)", "? 8 : 2)")
    (kernel,) = compiled("f32", "sm_90", sources=sources)
    assert over_bounds([kernel])


def test_accesses_of_single_elements_are_found(compiled, changed):
    by = "for (int k = 0; k < N; ++k) v.x[k] = p[k];"
    sources = changed("elements.cuh", "memcpy(&v, &word, sizeof(word));", by)
    (kernel,) = compiled("f32", "sm_90", sources=sources)
    assert too_narrow([kernel], "f32")
