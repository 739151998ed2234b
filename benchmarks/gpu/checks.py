"""The steps of ``make gpu-check``: which commands, with which limits."""

from __future__ import annotations

import glob
import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path

from . import copying, flaggems, hosts, single, whole
from .steps import OWN_LIMIT, Step

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"

NO_GPU_NEEDED = (
    "test_buffers.py",
    "test_cuda_*.py",
    "test_gpu_*.py",
    "test_group_distributed.py",
    "test_group_fully_shard.py",
    "test_instruction_sets.py",
    "test_triton_balance.py",
    "test_triton_jit.py",
    "test_triton_offline.py",
    "test_triton_plan.py",
    "test_triton_variants.py",
    "test_with_*.py",
)
"""Tests that are the same on every machine, and take their time: CI runs them."""

TEST_PROCESSES = 8
DUMP_S = 60
"""A test that takes longer writes where it is."""

TOOLS = ("memcheck", "racecheck")
SANITIZER = "compute-sanitizer"

INFO = """if True:
    import json, wnkernel
    facts = wnkernel.info()
    print(json.dumps(facts, indent=2))
    print("backends that run:", ", ".join(n for n, why in facts["backends"].items() if not why))
"""


def steps(out: Path) -> list[Step]:
    """All steps, in their order, writing to a folder."""
    sanitizers = map(_sanitizer, TOOLS)
    return [_machine(), _build(), _info(), _tests(out), _kernels(), *sanitizers, *_benchmarks(out)]


def _python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def _environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **more}


def _machine() -> Step:
    query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.memory"
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    absent = "" if shutil.which(command[0]) else "nvidia-smi was not found"
    return Step("machine", command, 20.0, absent=absent)


def _build() -> Step:
    return Step("build", _python("-m", "benchmarks.gpu.build"), 150.0, environment=_environment())


def _info() -> Step:
    return Step("info", _python("-c", INFO), 30.0, 10.0, environment=_environment())


def _tests(out: Path) -> Step:
    name, limit_s, reserve_s = "tests", 150.0, 60.0
    if importlib.util.find_spec("pytest") is None:
        return Step(name, (), limit_s, absent="pytest is not installed")
    command = _python("-m", "pytest", "--device", "cuda", "-q", "-p", "no:cacheprovider")
    command += ["-o", f"faulthandler_timeout={DUMP_S}", f"--junitxml={out.resolve() / 'tests.xml'}"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(TEST_PROCESSES, os.cpu_count() or 1))]
    left_out = {*not_importable(TESTS), *(p for name in NO_GPU_NEEDED for p in TESTS.glob(name))}
    command += [f"--ignore={path.relative_to(ROOT)}" for path in sorted(left_out)]
    return Step(name, [*command, "tests"], limit_s, reserve_s, environment=_environment())


def not_importable(folder: Path) -> list[Path]:
    """Test files that import a package which is not installed here: they would end the session."""
    packages = [p for p in ("hypothesis", "expecttest") if importlib.util.find_spec(p) is None]
    if not packages:
        return []
    imports = re.compile(rf"^(from|import) ({'|'.join(packages)})\b", re.MULTILINE)
    return [p for p in sorted(folder.glob("test_*.py")) if imports.search(p.read_text())]


KERNELS = _python("-m", "benchmarks.gpu.sanitized")


def _kernels() -> Step:
    """Without a tool first: what Triton compiles is kept on disk, and need not be watched."""
    return Step("kernels", KERNELS, 90.0, 20.0, environment=_environment())


def _sanitizer(tool: str) -> Step:
    found = sanitizer()
    absent = "" if found else f"{SANITIZER} was not found"
    command = [found, "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
    command += ["--target-processes", "application-only"]
    return Step(
        tool,
        [*command, *KERNELS],
        60.0,
        absent=absent,
        # every tensor an allocation of its own: within torch's pools nothing is out of bounds
        environment=_environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
    )


def sanitizer() -> str:
    """Where compute-sanitizer is; empty if it is nowhere."""
    homes = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", "")]
    folders = [os.path.join(home, "bin") for home in homes if home]
    folders += sorted(glob.glob("/usr/local/cuda*/bin"), reverse=True)
    folders += sorted(glob.glob("/usr/local/cuda*/compute-sanitizer"), reverse=True)
    return shutil.which(SANITIZER) or shutil.which(SANITIZER, path=os.pathsep.join(folders)) or ""


def _benchmarks(out: Path) -> list[Step]:
    """In processes of their own: what one does to the device, another does not see."""
    command = _python("-m", "benchmarks.gpu", "--no-summary", "--limit-s", OWN_LIMIT)
    command += ["--out", str(out.resolve())]

    def only(*sections: str) -> list[str]:
        return [*command, *(argument for s in sections for argument in ("--only", s))]

    rival = importlib.util.find_spec(flaggems.PACKAGE) is not None
    return [
        Step("weights", only(copying.CASE, single.CASE), 150.0, 100.0, _environment()),
        Step("models", only(whole.CASE, hosts.CASE), 80.0, 50.0, _environment()),
        Step(
            flaggems.CASE,
            only(flaggems.CASE),
            60.0,
            environment=_environment(),
            absent="" if rival else f"{flaggems.PACKAGE} is not installed",
            needed=False,
        ),
    ]
