"""The faults of mutants*.txt, all in one copy of csrc, where a number switches each of them on."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..written_mutants import Mutant, put_in, read
from .build import CSRC

CUDA = CSRC / "cuda"
BARRIER = "__syncthreads();"


def _barriers() -> Iterator[tuple[str, Mutant]]:
    for file in sorted(CUDA.glob("*.cuh")):
        for k in range(file.read_text().count(BARRIER)):
            yield f"no barrier {k + 1} in {file.name}", Mutant(file.name, BARRIER, "", "")


MUTANTS = read(Path(__file__).parent)
BARRIERS = dict(_barriers())
NUMBERS = {name: k for k, name in enumerate([*MUTANTS, *BARRIERS], 1)}
"""What simt::state.mutant has to be. 0 is none of them."""


def _on(name: str) -> str:
    return f"(simt::state.mutant == {NUMBERS[name]})"


def _without_barriers(file: str, text: str) -> str:
    names = iter(name for name, mutant in BARRIERS.items() if mutant.file == file)
    return re.sub(re.escape(BARRIER), lambda _: f"if (!{_on(next(names))}) {BARRIER}", text)


def write(csrc: Path) -> None:
    """The sources with all mutants."""
    shutil.rmtree(csrc, ignore_errors=True)
    shutil.copytree(CUDA, csrc / "cuda")
    shutil.copy(CSRC / "weight_norm.h", csrc)
    for file in sorted(csrc.glob("cuda/*")):
        text = put_in(file, MUTANTS, _on)
        text = _without_barriers(file.name, text)
        file.write_text(f'#include "block.h"\n{text}')
