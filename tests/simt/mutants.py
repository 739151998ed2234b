"""The faults of mutants*.txt, all in one copy of csrc, where a number switches each of them on."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .build import CSRC

CUDA = CSRC / "cuda"
BARRIER = "__syncthreads();"


class Mutant(NamedTuple):
    file: str
    old: str
    new: str
    sign: str


def _written_down() -> Iterator[tuple[str, Mutant]]:
    written = "\n".join(p.read_text() for p in sorted(Path(__file__).parent.glob("mutants*.txt")))
    text = re.sub(r"^#.*\n", "", written, flags=re.MULTILINE)
    for block in re.split(r"\n{2,}", text.strip()):
        name, *lines = block.splitlines()
        if not lines:
            file = name
            continue
        old, new, sign = ("\n".join(k[2:] for k in lines if k[0] == mark) for mark in "-+!")
        yield name, Mutant(file, old, new, sign)


def _barriers() -> Iterator[tuple[str, Mutant]]:
    for file in sorted(CUDA.glob("*.cuh")):
        for k in range(file.read_text().count(BARRIER)):
            yield f"no barrier {k + 1} in {file.name}", Mutant(file.name, BARRIER, "", "")


MUTANTS = dict(_written_down())
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
        text = file.read_text()
        for name, mutant in MUTANTS.items():
            if mutant.file == file.name:
                assert text.count(mutant.old) == 1, (
                    f"{name}: {text.count(mutant.old)} times in {file}"
                )
                text = text.replace(mutant.old, re.sub(r"\bON\b", _on(name), mutant.new))
        text = _without_barriers(file.name, text)
        file.write_text(f'#include "block.h"\n{text}')
