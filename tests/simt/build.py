"""Compiles csrc/cuda against the shim, once for all test processes of a session."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..compiling import alone_in, compile_to
from ..processes import ROOT

CSRC = ROOT / "csrc"
SHIM = ROOT / "tests" / "simt"
FLAGS = [
    *("-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DWNKERNEL_SIMT"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas"),
]
PAIRS = ("f32", "bf16", "f32_bf16", "f64")
"""Names of the pairs of types of v and w, as in csrc/weight_norm.h. Those of float16 differ from
bfloat16 by their rounding only, and take as long to compile and to run."""
if os.environ.get("WNKERNEL_OFFLINE_ALL"):
    PAIRS = (*PAIRS, "f16", "f32_f16")
RUNTIMES = ("libasan.so", "libubsan.so")


def missing() -> str:
    """Why nothing can be compiled here, or nothing."""
    if not shutil.which("g++"):
        return "the SIMT shim needs g++"
    for name, path in zip(RUNTIMES, runtimes(), strict=True):
        if not Path(path).is_absolute():
            return f"the SIMT shim needs {name} of g++"
    return ""


def runtimes() -> list[str]:
    """What has to be preloaded."""
    commands = (["g++", f"-print-file-name={name}"] for name in RUNTIMES)
    return [subprocess.check_output(c, text=True).strip() for c in commands]


def library(
    folder: Path, pairs: Sequence[str] = PAIRS, write: Callable[[Path], None] | None = None
) -> Path:
    """The shared library with the kernels of some pairs of types, from csrc or what ``write`` puts
    there instead; two compilers at a time. ``folder`` keeps what is compiled, and is for one state
    of the sources."""
    csrc = folder / "csrc" if write else CSRC
    result = folder / f"lib{'-'.join(pairs) or 'plan'}.so"
    units = [*(f"types_{pair}.cu" for pair in pairs), "dispatch.cpp"]
    sources = [csrc / "cuda" / unit for unit in units]
    sources += [SHIM / "driver.cpp", SHIM / "block.cpp", SHIM / "fiber.cpp"]
    objects = [folder / f"{source.stem}.o" for source in sources]
    flags = [*FLAGS, f"-I{SHIM}", f"-I{csrc}", "-x", "c++", "-c"]

    def compile_one(source: Path, result: Path) -> None:
        if not result.exists():
            compile_to(result, ["g++", *flags, str(source)])

    with alone_in(folder):
        if not result.exists():
            if write:
                write(csrc)
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(compile_one, sources, objects))
            link = ["g++", "-shared", "-fsanitize=address,undefined", *map(str, objects)]
            compile_to(result, link)
    return result
