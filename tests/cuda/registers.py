"""Prints what nvcc makes of the CUDA kernels, for docs/cuda.md: registers of a thread, how many
blocks a processor runs at a time with them, and the seconds and bytes that they take.

    python -m tests.cuda.registers                          # some types, sm_80, sm_90 and sm_100
    python -m tests.cuda.registers f64 f16 --arch sm_90
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from .compiler import SOURCES, Kernel, compile_kernels, find_tool

TYPES = tuple(sorted(source.stem.removeprefix("types_") for source in SOURCES.glob("types_*.cu")))
CHOSEN = ("f32", "bf16", "f32_bf16")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


def cell(kernel: Kernel) -> str:
    spills = f", {kernel.stack_bytes} B spilled" if kernel.stack_bytes else ""
    return f"{kernel.registers} ({kernel.blocks_of_processor}{spills})"


def table(types: list[str], architectures: list[str], to: Path) -> str:
    """In Markdown: a line for each kernel, a column for each pair of types and architecture."""
    nvcc, cuobjdump = find_tool("nvcc"), find_tool("cuobjdump")
    if nvcc is None or cuobjdump is None:
        raise SystemExit("nvcc or cuobjdump was not found")
    columns: dict[str, dict[str, str]] = {}
    for of in types:
        for arch in architectures:
            begin = time.perf_counter()
            source = SOURCES / f"types_{of}.cu"
            kernels = compile_kernels(nvcc, cuobjdump, source, arch, to)
            seconds = time.perf_counter() - begin
            size = (to / f"{source.stem}_{arch}.cubin").stat().st_size
            column = {str(k): cell(k) for k in sorted(kernels, key=Kernel.__str__, reverse=True)}
            columns[f"{of}, {arch}"] = column | {"MB": f"{size / 1e6:.1f}", "s": f"{seconds:.0f}"}
    names = next(iter(columns.values()))
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(column[name] for column in columns.values())] for name in names]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", metavar="TYPES", help=", ".join(TYPES))
    parser.add_argument("--arch", nargs="*", default=list(ARCHITECTURES))
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(table(chosen.types or list(CHOSEN), chosen.arch, Path(folder)))


if __name__ == "__main__":
    main()
