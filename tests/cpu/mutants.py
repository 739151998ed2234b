"""The faults of mutants.txt, all in one copy of csrc, where a number switches each of them on."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..processes import ROOT
from ..written_mutants import put_in, read

CSRC = ROOT / "csrc"
MUTANTS = read(Path(__file__).parent)
NUMBERS = {name: k for k, name in enumerate(MUTANTS, 1)}
"""What wnkernel_mutant has to be. 0 is none of them."""


def write(csrc: Path) -> None:
    """The sources with all mutants."""
    shutil.rmtree(csrc, ignore_errors=True)
    shutil.copytree(CSRC / "cpu", csrc / "cpu")
    shutil.copy(CSRC / "weight_norm.h", csrc)
    for file in sorted(csrc.glob("cpu/*")):
        text = put_in(file, MUTANTS, lambda name: f"(wnkernel_mutant == {NUMBERS[name]})")
        file.write_text(f"extern int wnkernel_mutant;\n{text}")
