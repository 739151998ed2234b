"""Versions of torch, Python and numpy that are tried, the tests that are run with each of them, and
what came of it: the table of docs/versions.md.

noxfile.py makes an environment for every leg and calls ``python -m tests.matrix run`` in it, which
writes one file of results; ``python -m tests.matrix table`` makes the table of all of them.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from datetime import date
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "versions"
PAGE = ROOT / "docs" / "versions.md"
BEGIN, END = "<!-- results -->\n", "<!-- end of results -->\n"


class Leg(NamedTuple):
    """One environment."""

    torch: str
    python: str
    numpy: str

    @property
    def requirements(self) -> list[str]:
        return [f"torch=={self.torch}", "numpy<2" if self.numpy == "1" else "numpy>=2"]

    @property
    def name(self) -> str:
        return f"torch-{self.torch}-py{self.python}"


LEGS = (
    Leg("2.4.1", "3.10", "1"),
    Leg("2.5.1", "3.11", "1"),
    Leg("2.6.0", "3.12", "2"),
    Leg("2.7.1", "3.10", "2"),
    Leg("2.8.0", "3.11", "2"),
    Leg("2.9.1", "3.10", "1"),
    Leg("2.10.0", "3.12", "2"),
    Leg("2.11.0", "3.13", "2"),
    Leg("2.12.1", "3.12", "2"),
    Leg("2.13.0", "3.10", "2"),
    Leg("2.13.0", "3.11", "2"),
    Leg("2.13.0", "3.12", "2"),
    Leg("2.13.0", "3.13", "2"),
    Leg("2.14.1", "3.11", "2"),
    Leg("2.15.0", "3.13", "2"),
)

PACKAGES = (
    *("setuptools>=77", "ninja", "pybind11"),
    *("pytest", "pytest-xdist", "pytest-timeout", "hypothesis"),
    *("cloudpickle", "joblib", "safetensors", "expecttest"),
)
"""What is installed beside torch and numpy."""

TIMEOUT_S = 600
"""A test that takes longer has failed. torch 2.7 has hung where a process group ends."""

LEFT_OUT = {
    "libraries/test_with_[!d]*": "other packages",
    "libraries/test_model_table": "other packages",
    "compile/test_onnx": "other packages",
    "cli/*": "the command line",
    "fuzz/test_strange_files": "the command line",
    "fuzz/test_killed": "the command line",
    "gpu/*": "GPUs, and the checks of a machine that has one",
    "cuda/*": "CUDA kernels, in a shim on the CPU",
    "triton/*": "Triton kernels, in Triton's interpreter",
    "project/*": "the project: its pages, its build, its benchmarks, its tests",
    "core/test_cpu_mutants": "the tests themselves",
    "core/test_mutants": "the tests themselves",
}
"""Test files that no leg runs, by their paths below tests/, and what they are about."""

AREAS = {
    "compile": ("compile/*", "grouping/test_*compile*", "grouping/test_tracing"),
    "distributed": (
        "grouping/test_distributed",
        "*/test_*fully_shard*",
        "libraries/test_tensor_parallel",
        "checkpoint/test_sharded",
        "libraries/test_with_distributed_checkpoint",
    ),
    "groups": ("grouping/*",),
    "conversion": ("checkpoint/*", "models/test_convert*", "models/test_fold"),
    "gradients": ("core/test_gradients", "core/test_transforms", "core/test_single_node"),
    "layers": ("*",),
}
"""Test files by area: each is in the first that has a pattern for it, but for :data:`LEFT_OUT`."""

SHOWN = ("layers", "gradients", "conversion", "groups", "compile", "distributed")
"""The areas, in the order in which they are run."""


def files_of(area: str) -> list[Path]:
    """The test files of an area."""
    return [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if area_of(path) == area]


def area_of(path: Path) -> str | None:
    """The area of a test file; None if no leg runs it."""
    name = path.relative_to(ROOT / "tests").with_suffix("").as_posix()
    if any(fnmatch(name, pattern) for pattern in LEFT_OUT):
        return None
    return next(a for a, patterns in AREAS.items() if any(fnmatch(name, p) for p in patterns))


def run(out: Path, commit: str) -> int:
    """Runs the tests of all areas in this environment, and writes what came of them.

    Returns:
        How many tests failed.

    Raises:
        RuntimeError: if the compiled module cannot be loaded: its tests would be skipped.
    """
    import wnkernel  # noxfile.py has no torch

    if error := wnkernel.info()["load_error"]:
        raise RuntimeError(error)
    areas, skips, failures = {}, Counter(), []
    for area in SHOWN:
        counts = Counter(passed=0, failed=0, skipped=0)
        for name, outcome, reason in outcomes(area):
            counts[outcome] += 1
            if outcome == "failed":
                failures.append(name)
            elif outcome == "skipped":
                skips[reason] += 1
        areas[area] = dict(counts)
    result = {
        "torch": version("torch"),
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "platform": " ".join((platform.system(), platform.machine(), *platform.libc_ver())),
        "cpu": cpu(),
        "date": date.today().isoformat(),
        "commit": commit,
        "areas": areas,
        "failures": failures,
        "skips": dict(skips.most_common()),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return len(failures)


def outcomes(area: str) -> list[tuple[str, str, str]]:
    """Of every test of an area: its name, passed, failed or skipped, and why it was skipped."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", f"--junitxml={report}"]
        command.append(f"--timeout={TIMEOUT_S}")
        files = [path.relative_to(ROOT).as_posix() for path in files_of(area)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("WNKERNEL_")}
        environment["OMP_WAIT_POLICY"] = "passive"
        done = subprocess.run([*command, *files], cwd=ROOT, env=environment, check=False)
        found = []
        if report.exists():
            found = [outcome(test) for test in ElementTree.parse(report).iter("testcase")]
        failed = any(result == "failed" for _, result, _ in found)
        if not found or done.returncode != int(failed):  # tests are missing: a crash, no tests
            found.append((f"pytest ended with status {done.returncode}: {area}", "failed", ""))
        return found


def outcome(test: ElementTree.Element) -> tuple[str, str, str]:
    """What pytest's report says of a test."""
    name = f"{test.get('classname')}::{test.get('name')}"
    if test.find("failure") is not None or test.find("error") is not None:
        return name, "failed", ""
    if (skipped := test.find("skipped")) is not None:
        return name, "skipped", skipped.get("message", "")
    return name, "passed", ""


def cpu() -> str:
    """What the system calls the first CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def results() -> dict[str, dict[str, Any]]:
    """What :func:`run` has written, by the names of legs."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The generated part of docs/versions.md."""
    from wnkernel._versions import LIMITS, release  # noxfile.py has no torch

    header = ["torch", "Python", "numpy", *SHOWN, "date", "commit", "this torch lacks"]
    rows = [header, ["---"] * len(header)]
    skips: dict[str, dict[str, int]] = {}
    for leg in LEGS:
        lacks = ", ".join(k for k, limit in LIMITS.items() if release(leg.torch) < limit.since)
        if (result := found.get(leg.name)) is None:
            numbers = [leg.torch, leg.python, leg.numpy, *["not run"] * len(SHOWN), "", ""]
        else:
            areas = [cell(result["areas"][area]) for area in SHOWN]
            versions = [result[name] for name in ("torch", "python", "numpy")]
            numbers = [*versions, *areas, result["date"], result["commit"]]
            for reason, count in result["skips"].items():
                skips.setdefault(reason, {})[leg.name] = count
        rows.append([*numbers, lacks])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", "What a torch lacks (`wnkernel info` says it of the one that is there):", ""]
    for name, limit in LIMITS.items():
        lines.append(f"- {name}, before torch {limit.since[0]}.{limit.since[1]}: {limit.what}.")
    machines = sorted({f"{result['cpu']}, {result['platform']}" for result in found.values()})
    lines += ["", *(f"Run on: {machine}." for machine in machines)]
    if skips:
        lines += ["", "Skipped, and why:", ""]
    for reason, counts in sorted(skips.items()):
        least, most = min(counts.values()), max(counts.values())
        tests = f"{least}" if least == most else f"{least} to {most}"
        where = "every row" if len(counts) == len(found) else ", ".join(counts)
        lines.append(f"- {reason}: {tests} in {where}.")
    return "\n".join(lines).rstrip() + "\n"


def cell(counts: Mapping[str, int]) -> str:
    """Of an area."""
    failed = f", **{counts['failed']} failed**" if counts["failed"] else ""
    return f"{counts['passed']} passed{failed}, {counts['skipped']} skipped"


def page(text: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    """docs/versions.md with another table."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + table(found) + END + rest.partition(END)[2]


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", out, commit]:
            sys.exit(run(Path(out), commit) > 0)
        case ["table"]:
            PAGE.write_text(page(PAGE.read_text(), results()))
        case _:
            sys.exit(__doc__)
