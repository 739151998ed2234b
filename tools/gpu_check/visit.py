"""The steps of ``make gpu-check``: their commands, their order, their limits."""

from __future__ import annotations

import glob
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.environment import ROOT
from benchmarks.gpu.cases import Section
from benchmarks.gpu.plan import Part
from benchmarks.gpu.raw import FLAGGEMS_PACKAGE

from .smoke import DTYPES
from .steps import OWN_LIMIT, Step
from .tests_to_run import FIRST, OTHERS, RESULTS, arguments, files, is_installed
from .versions import Facts

LIMIT_S = 475.0
"""The limit for all steps. Two visits and their starts fit into a quarter of an hour."""

SUMMARY_S = 5.0  # The part of the limit for what follows the last step.
TEST_S, LONG_TEST_S = 25.0, 60.0
"""The limits for one test. Most take less than a second, those that compile take 20."""

SANITIZER, PROFILER = "compute-sanitizer", "ncu"
TOOLS = ("memcheck", "racecheck")
WATCHED = ("float32", "bfloat16")
"""The dtypes under a sanitizer, where everything is slow. The other dtypes share their sources."""

REPORT = "ncu.txt"  # In the folder of results.
BACKENDS_OF_TESTS = {
    ("cuda", "cuda"): ("cuda", "auto"),
    ("cuda", "triton"): ("triton",),
    ("cpu", "cuda"): ("cpu", "auto"),
    ("cpu", "triton"): ("eager",),
}
"""The backends of the tests, by the device and the name of the step."""


def tool(name: str) -> str:
    """Return the path of a tool of CUDA; empty if it is not found."""
    homes = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", "")]
    folders = [os.path.join(home, "bin") for home in homes if home]
    known = ("/usr/local/cuda*/bin", f"/usr/local/cuda*/{name}", "/opt/nvidia/nsight-compute/*")
    folders += [folder for pattern in known for folder in sorted(glob.glob(pattern), reverse=True)]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders)) or ""


def versions() -> Step:
    """Return the first step, which finds the facts for the others."""
    return Step("versions", _python("tools.gpu_check.versions"), 25.0, environment=_here())


def steps(out: Path, facts: Facts, *, device: str = "cuda") -> list[Step]:
    """Return all steps after the first, the most valuable first. On a CPU they try the visit
    itself, with small sizes."""
    v = _Visit(out.resolve(), facts, device)
    found = [
        # The build is only for this card. If it fails, nothing follows, because it must be repaired
        # first. If nothing can be built, the steps without a build run.
        replace(
            Step("build", _python("tools.gpu_check.build"), 130.0, decides=True),
            absent=facts.no_build or facts.no_cuda,
        ),
        # This runs beside the build. Triton keeps its kernels on disk, where later steps find them.
        *v.each_dtype("compile triton", "triton", 130.0, all_beside=True),
        *v.each_dtype("smoke, cuda", "cuda", 20.0),
        v.benchmark("key figures, cuda", "cuda", Part.KEY, 90.0),
        v.tests("tests, cuda", "cuda", 100.0),
        *v.sanitizers(95.0),
        v.profile(40.0),
        *v.each_dtype("smoke, triton", "triton", 20.0),
        replace(v.benchmark("key figures, triton", "triton", Part.KEY, 45.0), grace_s=4.0),
        replace(v.benchmark("more figures, cuda", "cuda", Part.REST, 120.0), needed=False),
        replace(v.tests("tests, triton", "triton", 100.0), needed=False),
        replace(v.tests("other tests", "", 200.0), needed=False),
        replace(v.benchmark("more figures, triton", "triton", Part.REST, 120.0), needed=False),
        v.rival(60.0),
    ]
    told = _here(**({"WNKERNEL_COMMIT": facts.commit} if facts.commit else {}))
    return [replace(step, environment={**told, **step.environment}) for step in found]


class _Visit:
    """The settings that the steps of one visit share."""

    def __init__(self, out: Path, facts: Facts, device: str) -> None:
        self._out, self._facts, self._device = out, facts, device
        self._is_dry = device == "cpu"
        self._absent = {"cuda": facts.no_build or facts.no_cuda, "triton": facts.no_triton, "": ""}
        if self._is_dry:
            self._absent = dict.fromkeys(self._absent, "")

    def each_dtype(
        self, name: str, backend: str, limit_s: float, *, all_beside: bool = False
    ) -> list[Step]:
        """Return one process per dtype, side by side: a device fault of one does not reach the
        others."""
        absent = "a CPU needs none" if all_beside and self._is_dry else self._absent[backend]
        return [
            Step(
                f"{name}, {dtype}",
                self._smoke(backend, dtype),
                limit_s,
                beside=all_beside or k > 0,
                absent=absent,
            )
            for k, dtype in enumerate(DTYPES)
        ]

    def _smoke(self, backend: str, *dtypes: str) -> list[str]:
        command = _python("tools.gpu_check.smoke", "--device", self._device)
        command += [] if self._is_dry else ["--backend", backend]
        return [*command, *(word for dtype in dtypes for word in ("--dtype", dtype))]

    def benchmark(self, name: str, backend: str, part: Part, limit_s: float) -> Step:
        """Return the benchmark of one backend beside torch. Without CUDA kernels, CUDA's turn
        measures torch and copies."""
        sections = [Section.SINGLE, Section.WHOLE, Section.HOST]
        if backend == "cuda":
            sections.insert(0, Section.COPY)
        runs = not self._absent[backend]
        command = self._measure(sections, backend if runs else "eager", part)
        absent = "" if backend == "cuda" else self._absent[backend]
        return Step(name, command, limit_s, grace_s=8.0, absent=absent)

    def rival(self, limit_s: float) -> Step:
        """Return the benchmark of FlagGems, where it is installed."""
        absent = "" if is_installed(FLAGGEMS_PACKAGE) else f"{FLAGGEMS_PACKAGE} is not installed"
        command = self._measure([Section.FLAGGEMS], "", Part.REST)
        return Step(Section.FLAGGEMS.value, command, limit_s, absent=absent, needed=False)

    def _measure(self, sections: Sequence[Section], backend: str, part: Part) -> list[str]:
        command = _python("benchmarks.gpu", "--no-summary", "--limit-s", OWN_LIMIT)
        command += ["--out", str(self._out), "--part", part.value, "--device", self._device]
        if self._is_dry:
            command += ["--tiny"]
        elif backend:
            command += ["--backend", backend]
        return [*command, *(word for s in sections for word in ("--only", s.value))]

    def tests(self, name: str, backend: str, limit_s: float) -> Step:
        """Return the most important tests of one backend, or all others."""
        command = arguments(
            files(FIRST) if backend else files(OTHERS, without=FIRST),
            device=self._device,
            backends=BACKENDS_OF_TESTS.get((self._device, backend), ()),
            and_others=backend != "triton",
            test_s=TEST_S if backend else LONG_TEST_S,
            results=self._out / RESULTS,
            about=self._facts.about,
        )
        absent = self._absent[backend] if is_installed("pytest") else "pytest is not installed"
        return Step(name, _python("pytest", *command), limit_s, grace_s=20.0, absent=absent)

    def sanitizers(self, limit_s: float) -> list[Step]:
        """Return the sanitizer steps, which run beside the tests, where nothing is timed."""
        found = tool(SANITIZER)
        absent = self._absent["cuda"] or ("" if found else f"{SANITIZER} was not found")
        options = ["--error-exitcode", "9", "--report-api-errors", "no", "--print-limit", "20"]
        options += ["--target-processes", "application-only", *self._smoke("cuda", *WATCHED)]
        # Every tensor is an allocation of its own: inside torch's pools no access is out of bounds.
        own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        step = Step("", [], limit_s, beside=True, absent=absent, environment=own)
        return [replace(step, name=n, command=[found, "--tool", n, *options]) for n in TOOLS]

    def profile(self, limit_s: float) -> Step:
        """Return the step for hardware counters of eight launches, without a change of the card's
        clock."""
        absent = self._absent["cuda"] or ("" if tool(PROFILER) else f"{PROFILER} was not found")
        told = str(self._out / REPORT), self._facts.about
        return Step("profile", _python("tools.gpu_check.profiling", *told), limit_s, absent=absent)


def _python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def _here(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # Threads that spin while they wait would slow the processes beside them.
    return {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "passive", **more}
