"""What tests/cpu/values.cpp would find: each of the faults of tests/cpu/mutants.txt. These run when
they are asked for, for they take minutes."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from ..cpu.launches import missing, program
from ..cpu.mutants import MUTANTS, NUMBERS, write
from .test_cpu_values import MACHINES, said

WANTED = "" if os.environ.get("WNKERNEL_MUTANTS") else "`make mutants` runs these"

when_asked = pytest.mark.skipif(bool(missing() or WANTED), reason=missing() or WANTED)


@pytest.fixture(scope="session")
def mutated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return program(tmp_path_factory, "values.cpp", write=write)


def test_every_fault_has_its_place(tmp_path: Path) -> None:
    """The lines that faults change are still there."""
    write(tmp_path)


@when_asked
def test_kernels_without_a_fault_pass(mutated: Path) -> None:
    assert said(mutated, "0") == ""


@when_asked
@pytest.mark.parametrize("name", NUMBERS)
def test_a_fault_is_found(mutated: Path, name: str) -> None:
    """With some instruction set and some caches."""
    found = (said(mutated, str(NUMBERS[name]), **machine) for machine in MACHINES.values())
    assert (verdict := next(filter(None, found), "")), "nothing was found"
    assert re.search(MUTANTS[name].sign, verdict)
