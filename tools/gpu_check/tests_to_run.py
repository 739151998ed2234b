"""Which tests a visit to a GPU runs, and with which arguments of pytest."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.environment import ROOT

TESTS = ROOT / "tests"

FIRST = (
    *(f"gpu/test_on_gpus_{name}.py" for name in ("bits", "streams", "graphs")),
    *(f"core/test_{name}.py" for name in ("values", "gradients", "lists", "norms")),
    *("core/test_norms_of_v.py", "core/test_determinism.py", "grouping/test_launches.py"),
    *("grouping/test_autograd.py", "grouping/test_modes.py", "models/test_layer.py"),
    "core/test_operators.py",
)
"""Those that say most about kernels, in the order of their worth."""

NO_GPU_NEEDED = (
    *("cli/*.py", "cuda/*.py", "fuzz/*.py", "gpu/test_[!o]*.py", "project/*.py"),
    *("compile/test_export_files.py", "compile/test_onnx.py", "core/test_buffers.py"),
    *("core/test_instruction_sets.py", "grouping/test_distributed.py"),
    *("grouping/test_fully_shard.py", "libraries/test_with_*.py"),
    *(f"triton/test_{name}.py" for name in ("balance", "jit", "offline", "plan", "variants")),
)
"""Tests that are the same on every machine, and take their time: CI runs them."""

OTHERS = ("gpu/test_on_gpus_large.py", "*/test_*.py")
"""Those that are not among the first. Tests of large weights wait for each other's memory."""

OPTIONAL = ("hypothesis", "expecttest", "safetensors")
"""Packages that some files of tests cannot do without."""

RESULTS = "tests.csv"  # In the folder of results.
MOST_PROCESSES = 8
MOST_FAILURES = 60
MOST_CRASHES = 20  # Of processes, each of which loses a few seconds.


def is_installed(package: str) -> bool:
    """Whether it can be imported."""
    return importlib.util.find_spec(package) is not None


def files(patterns: Sequence[str], without: Sequence[str] = ()) -> list[Path]:
    """Of the tests, in the order of the patterns: without those that need no GPU, or a package that
    is not installed, which could end the session."""
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
    """What pytest is told.

    Args:
        chosen: files.
        device: where tests create their tensors.
        backends: only tests that are run on one of these; empty for all tests.
        and_others: those, too, that are not run on one backend after the other.
        test_s: a test that takes longer is ended, where pytest-timeout is installed. Somewhat
            before that it writes where it is.
        results: the CSV file that a line is added to after every test.
        about: the device and the commit, for that file.
    """
    command = ["--device", device, "-q", "--tb=short", f"--maxfail={MOST_FAILURES}"]
    command += ["-p", "no:cacheprovider", "-p", "tests.gpu.visit", "-r", "fE"]
    command += ["-o", f"faulthandler_timeout={0.8 * test_s:.0f}"]
    command += ["--results", str(results), "--about", about]
    command += ["--only-backends", ",".join(backends)] + ["--and-without-backend"] * and_others
    if is_installed("pytest_timeout"):
        # by a thread: no signal ends a call of CUDA that does not return
        command += ["--timeout", f"{test_s:.0f}", "--timeout-method", "thread"]
    if is_installed("xdist"):
        processes = min(MOST_PROCESSES, os.cpu_count() or 1)
        command += ["-n", str(processes), f"--max-worker-restart={MOST_CRASHES}"]
    return [*command, *(str(p.relative_to(ROOT)) for p in chosen)]
