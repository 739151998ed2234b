"""Faults that are written down: texts of sources and what takes their places, all in one copy,
where a number switches each of them on."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Mutant(NamedTuple):
    file: str
    old: str
    """What stands in the file once."""
    new: str
    """ON is whether this fault is asked for."""
    sign: str
    """A pattern of what is said about it."""


def read(folder: Path) -> dict[str, Mutant]:
    """The faults of mutants*.txt, by their names."""
    written = "\n".join(p.read_text() for p in sorted(folder.glob("mutants*.txt")))
    text = re.sub(r"^#.*\n", "", written, flags=re.MULTILINE)
    mutants = {}
    for block in re.split(r"\n{2,}", text.strip()):
        name, *lines = block.splitlines()
        if not lines:
            file = name
            continue
        assert name not in mutants, name
        old, new, sign = ("\n".join(k[2:] for k in lines if k[0] == mark) for mark in "-+!")
        mutants[name] = Mutant(file, old, new, sign)
    return mutants


def put_in(path: Path, mutants: dict[str, Mutant], on: Callable[[str], str]) -> str:
    """The text of a source with all its faults, ``on(name)`` being the condition of each."""
    text = path.read_text()
    for name, mutant in mutants.items():
        if mutant.file != path.name:
            continue
        assert text.count(mutant.old) == 1, f"{name}: {text.count(mutant.old)} times in {path}"
        text = text.replace(mutant.old, re.sub(r"\bON\b", on(name), mutant.new))
    return text
