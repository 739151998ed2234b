"""Compiles programs with csrc/cpu, once for all test processes of a session, and reads what
shares.cpp prints."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from ..compiling import alone_in, compile_to, shared_folder
from ..processes import PATIENCE_S, ROOT

COMPILER = os.environ.get("CXX", "c++")
"""As in setup.py."""
FLAGS = ["-std=c++17", "-O1", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
HERE = Path(__file__).parent

F16, BF16, F32, F64 = range(4)
"""Types, as csrc/weight_norm.h counts them."""


class Weight(NamedTuple):
    """[outer, rows, inner] as in csrc/weight_norm.h, and how many of its rows leave the float
    range."""

    outer: int
    rows: int
    inner: int
    v_type: int = F32
    w_type: int = F32
    huge_rows: int = 0

    @property
    def numel(self) -> int:
        return self.outer * self.rows * self.inner


class Launch(NamedTuple):
    """What was done, in elements of w (or grad_v) of every weight."""

    hash: str
    """Of all results."""
    outside: list[int]
    """By the thread that launches, without asking for others."""
    calls: list[list[list[int]]]
    """For each time that threads were asked for, what each of them did."""


def missing() -> str:
    """Why nothing can be compiled here, or nothing."""
    if os.name == "nt" or not shutil.which(COMPILER.split()[0]):
        return f"there is no C++ compiler {COMPILER}"
    return ""


def program(
    folders: pytest.TempPathFactory,
    source: str,
    *flags: str,
    write: Callable[[Path], None] | None = None,
) -> Path:
    """One of the programs of this folder, with csrc, or with what ``write`` puts in its place."""
    name = "".join(["cpu_", Path(source).stem, "_mutated" * (write is not None), *flags])
    folder = shared_folder(folders, name)
    csrc = folder / "csrc" if write else ROOT / "csrc"
    result = folder / "program"
    with alone_in(folder):
        if not result.exists():
            if write:
                write(csrc)
            sources = map(str, [*sorted((csrc / "cpu").glob("*.cpp")), HERE / source])
            compile_to(result, [*COMPILER.split(), *FLAGS, *flags, *sources, "-pthread"])
    return result


def launches(
    program: Path,
    direction: str,
    threads: Sequence[int],
    weights: Sequence[Weight],
    **environment: str,
) -> dict[int, Launch]:
    """One for each number of threads, of a list of weights, "forward" or "backward"."""
    command = [str(program), direction, ",".join(map(str, threads))]
    command += [",".join(map(str, weight)) for weight in weights]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | environment, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return {count: _parse(line, len(weights)) for count, line in zip(threads, lines, strict=True)}


def _parse(line: str, weights: int) -> Launch:
    outside, *calls = line.split("|")
    name, *counts = outside.split()
    numbers = [list(map(int, call.split())) for call in calls]
    return Launch(
        name,
        list(map(int, counts)),
        [[call[k : k + weights] for k in range(0, len(call), weights)] for call in numbers],
    )
