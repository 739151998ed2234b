"""The tests that a visit to a GPU runs, and the arguments of pytest."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.environment import ROOT

TESTS = ROOT / "tests"

FIRST = (
    *(f"gpu/test_on_gpus_{name}.py" for name in ("bits", "in_place", "streams", "graphs")),
    *(f"core/test_{name}.py" for name in ("values", "gradients", "lists", "norms")),
    *("core/test_norms_of_v.py", "core/test_determinism.py", "grouping/test_launches.py"),
    *("grouping/test_autograd.py", "grouping/test_modes.py", "models/test_layer.py"),
    "core/test_operators.py",
)
"""The tests that tell most about kernels, the most important first."""

NO_GPU_NEEDED = (
    *("cli/*.py", "cuda/*.py", "fuzz/*.py", "gpu/test_[!o]*.py", "project/*.py"),
    *("compile/test_export_files.py", "compile/test_onnx.py", "core/test_buffers.py"),
    *("core/test_instruction_sets.py", "grouping/test_distributed.py"),
    *("grouping/test_fully_shard.py", "libraries/test_with_*.py"),
    *(f"triton/test_{name}.py" for name in ("balance", "jit", "offline", "plan", "variants")),
)
"""Tests with the same result on every machine, which take long. CI runs them."""

OTHERS = ("gpu/test_on_gpus_large.py", "*/test_*.py")
"""All other tests. Tests of large weights wait for each other's memory."""

OPTIONAL = ("hypothesis", "expecttest", "safetensors")
"""Packages that some test files need."""

RESULTS = "tests.csv"  # In the folder of results.
MOST_PROCESSES = 8
MOST_FAILURES = 60
MOST_CRASHES = 20  # Of processes. Each crash loses a few seconds.


def is_installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def files(patterns: Sequence[str], without: Sequence[str] = ()) -> list[Path]:
    """Return test files in the order of the patterns, without those that need no GPU or a package
    that is not installed: a missing package could end the whole run."""
    left_out = {p for name in (*NO_GPU_NEEDED, *without) for p in TESTS.glob(name)}
    if packages := [p for p in OPTIONAL if not is_installed(p)]:
        imports = re.compile(rf"^(from|import) ({'|'.join(packages)})\b", re.MULTILINE)
        left_out |= {p for p in TESTS.glob("*/test_*.py") if imports.search(p.read_text())}
    found = dict.fromkeys(p for pattern in patterns for p in sorted(TESTS.glob(pattern)))
    return [p for p in found if p not in left_out]


def arguments(
    chosen: Sequence[Path],
    *,
    device: str,
    backends: Sequence[str],
    and_others: bool,
    test_s: float,
    results: Path,
    about: str,
) -> list[str]:
    """Return the command that runs pytest.

    Args:
        chosen: test files.
        device: where tests create their tensors.
        backends: run only tests on one of these; empty means all tests.
        and_others: also run tests that do not run on one backend after the other.
        test_s: the time limit of a test, if pytest-timeout is installed. Shortly before it ends, a
            test writes where it is.
        results: the CSV file that gets a line after every test.
        about: the device and the commit, for that file.
    """
    command = ["--device", device, "-q", "--tb=short", f"--maxfail={MOST_FAILURES}"]
    command += ["-p", "no:cacheprovider", "-p", "tests.gpu.visit", "-r", "fE"]
    command += ["-o", f"faulthandler_timeout={0.8 * test_s:.0f}"]
    command += ["--results", str(results), "--about", about]
    command += ["--only-backends", ",".join(backends)] + ["--and-without-backend"] * and_others
    if is_installed("pytest_timeout"):
        # A thread ends the test, because a signal does not end a call of CUDA that hangs.
        command += ["--timeout", f"{test_s:.0f}", "--timeout-method", "thread"]
    if is_installed("xdist"):
        processes = min(MOST_PROCESSES, os.cpu_count() or 1)
        command += ["-n", str(processes), f"--max-worker-restart={MOST_CRASHES}"]
    return [*command, *(str(p.relative_to(ROOT)) for p in chosen)]
