"""The CPU kernels alone, without torch: values, gradients and bits with every instruction set, and
not one byte outside of the arrays, also by instructions that no sanitizer watches."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from ..bits import SETS
from ..cpu.launches import missing, program
from ..processes import PATIENCE_S
from ..wide_reference import IS_WIDE, NOT_WIDE

pytestmark = [
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.skipif(not IS_WIDE, reason=NOT_WIDE),
]

SMALL = {"WNKERNEL_CPU_L1D": "4K", "WNKERNEL_CPU_L2": "16K", "WNKERNEL_CPU_L3": "16K"}
MACHINES = {
    **{name: {"WNKERNEL_CPU_ISA": name} for name in SETS},
    "small caches": SMALL,
}
"""Environment variables. Results that leave small caches are written past them."""


def said(program: Path, *arguments: str, **environment: str) -> str:
    """What tests/cpu/values.cpp says is wrong: a line, or its status; nothing if all is well."""
    done = subprocess.run(
        [program, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    return "" if done.returncode == 0 else f"{done.stderr}status {done.returncode}"


@pytest.fixture(scope="session")
def values(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return program(tmp_path_factory, "values.cpp")


@pytest.mark.parametrize("machine", MACHINES)
def test_values_gradients_and_bits(values: Path, machine: str) -> None:
    assert said(values, **MACHINES[machine]) == ""
