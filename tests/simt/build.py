"""Compiles csrc/cuda against the shim, once for all test processes of a session."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..processes import ROOT

CSRC = ROOT / "csrc"
SHIM = ROOT / "tests" / "simt"
FLAGS = [
    *("-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DWNKERNEL_SIMT"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas"),
]
PAIRS = ("f32", "bf16", "f32_bf16", "f64")
"""Names of the pairs of types of v and w, as in csrc/cuda/launch.h. Those of float16 differ from
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
    import fcntl  # Windows has none, nor these sanitizers

    folder.mkdir(parents=True, exist_ok=True)
    csrc = folder / "csrc" if write else CSRC
    result = folder / f"lib{'-'.join(pairs) or 'plan'}.so"
    units = [*(f"types_{pair}.cu" for pair in pairs), "dispatch.cpp"]
    sources = [csrc / "cuda" / unit for unit in units]
    sources += [SHIM / "driver.cpp", SHIM / "block.cpp", SHIM / "fiber.cpp"]
    objects = [folder / f"{source.stem}.o" for source in sources]
    flags = [*FLAGS, f"-I{SHIM}", f"-I{csrc}", "-x", "c++", "-c"]

    def compile_one(source: Path, result: Path) -> None:
        if not result.exists():
            _run(["g++", *flags, str(source)], result)

    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            if write:
                write(csrc)
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(compile_one, sources, objects))
            _run(["g++", "-shared", "-fsanitize=address,undefined", *map(str, objects)], result)
    return result


def _run(command: list[str], result: Path) -> None:
    """A result is there in whole or not at all."""
    part = result.with_suffix(".part")
    done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    part.rename(result)
