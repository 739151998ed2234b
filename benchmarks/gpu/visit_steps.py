"""The steps of ``make gpu-check``: which commands, in which order, with which limits."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..environment import ROOT
from . import copying, flaggems, hosts, profiling, single, smoke, whole
from .plan import Part
from .steps import OWN_LIMIT, Step
from .tests_to_run import FIRST, OTHERS, RESULTS, arguments, files
from .tools import PROFILER, SANITIZER, tool
from .versions import Facts

LIMIT_S = 475.0
"""For everything. A machine is lent for fifteen minutes, its start included: two visits."""

SUMMARY_S = 5.0
"""Of that, for what comes after the last step."""

TEST_PROCESSES = 8
TEST_S, LONG_TEST_S = 25.0, 60.0
"""A test that takes longer is ended. Most take less than a second; those that compile, 20."""

TOOLS = ("memcheck", "racecheck")
WATCHED = ("float32", "bfloat16")
"""Under a sanitizer everything takes long. The other types are the same sources."""

BACKENDS_OF_TESTS = {
    ("cuda", "cuda"): ("cuda", "auto"),
    ("cuda", "triton"): ("triton",),
    ("cuda", ""): (),
    ("cpu", "cuda"): ("cpu", "auto"),
    ("cpu", "triton"): ("eager",),
    ("cpu", ""): (),
}
"""By the device, and what a step is called after."""


def versions() -> Step:
    """The first step, which says what the others have to know."""
    return Step("versions", _python("-m", "benchmarks.gpu.versions"), 25.0, environment=_here())


def steps(out: Path, facts: Facts, *, device: str = "cuda") -> list[Step]:
    """All steps after the first, in their order: what is worth most first.

    Args:
        out: the folder of results.
        facts: why some of them cannot run.
        device: ``"cpu"`` is for trying out the visit itself, in small.
    """
    visit = Visit(out.resolve(), facts, device)
    return [
        visit.build(),
        *visit.compilations(),
        *visit.smoke("cuda", 20.0),
        visit.benchmark("key figures, cuda", "cuda", Part.KEY, 90.0),
        visit.tests("tests, cuda", "cuda", 100.0),
        *visit.sanitizers(95.0),
        visit.profile(40.0),
        *visit.smoke("triton", 20.0),
        visit.benchmark("key figures, triton", "triton", Part.KEY, 45.0, grace_s=4.0),
        visit.benchmark("more figures, cuda", "cuda", Part.REST, 120.0, needed=False),
        visit.tests("tests, triton", "triton", 100.0, needed=False),
        visit.tests("other tests", "", 200.0, needed=False),
        visit.benchmark("more figures, triton", "triton", Part.REST, 120.0, needed=False),
        visit.rival(60.0),
    ]


class Visit:
    """What the steps of one visit have in common."""

    def __init__(self, out: Path, facts: Facts, device: str) -> None:
        self._out, self._facts, self._device = out, facts, device
        self._is_dry = device == "cpu"
        self._absent = {"cuda": facts.no_build or facts.no_cuda, "triton": facts.no_triton, "": ""}
        if self._is_dry:
            self._absent |= {"cuda": "", "triton": ""}
        self._environment = _here(**({"WNKERNEL_COMMIT": facts.commit} if facts.commit else {}))

    def _step(self, name: str, command: Sequence[str], limit_s: float, **more: object) -> Step:
        environment = {**self._environment, **more.pop("environment", {})}
        return Step(name, command, limit_s, environment=environment, **more)

    def build(self) -> Step:
        """For this card alone. A build that fails is to be mended at once: nothing comes after it.
        Where nothing can be built, what needs no build is run."""
        return self._step(
            "build",
            _python("-m", "benchmarks.gpu.build"),
            130.0,
            decides=True,
            absent=self._facts.no_build or self._facts.no_cuda,
        )

    def compilations(self) -> list[Step]:
        """Triton's variants, a process per type of elements, beside the build: they are kept on
        disk, and what comes later finds them there."""
        return [
            self._step(
                f"compile triton, {dtype}",
                _smoke("triton", self._device, dtype),
                130.0,
                beside=True,
                absent="a CPU needs none" if self._is_dry else self._absent["triton"],
            )
            for dtype in smoke.DTYPES
        ]

    def smoke(self, backend: str, limit_s: float) -> list[Step]:
        """A process per type of elements, side by side: what one does to the device, another does
        not see."""
        return [
            self._step(
                f"smoke, {backend}, {dtype}",
                _smoke(backend, self._device, dtype),
                limit_s,
                beside=k > 0,
                absent=self._absent[backend],
            )
            for k, dtype in enumerate(smoke.DTYPES)
        ]

    def benchmark(
        self,
        name: str,
        backend: str,
        part: Part,
        limit_s: float,
        *,
        grace_s: float = 8.0,
        needed: bool = True,
    ) -> Step:
        """Of one backend beside torch. Without kernels, CUDA's turn measures torch and copies."""
        sections = [single.CASE, whole.CASE, hosts.CASE]
        if backend == "cuda":
            sections.insert(0, copying.CASE)
        runs = not self._absent[backend]
        command = self._measure(sections, backend if runs else "eager", part)
        absent = "" if runs or backend == "cuda" else self._absent[backend]
        return self._step(name, command, limit_s, grace_s=grace_s, absent=absent, needed=needed)

    def rival(self, limit_s: float) -> Step:
        """FlagGems, where it is installed."""
        there = importlib.util.find_spec(flaggems.PACKAGE) is not None
        command = self._measure([flaggems.CASE], "", Part.REST)
        absent = "" if there else f"{flaggems.PACKAGE} is not installed"
        return self._step(flaggems.CASE, command, limit_s, absent=absent, needed=False)

    def _measure(self, sections: Sequence[str], backend: str, part: Part) -> list[str]:
        command = _python("-m", "benchmarks.gpu", "--no-summary", "--limit-s", OWN_LIMIT)
        command += ["--out", str(self._out), "--part", part.value, "--device", self._device]
        if backend and not self._is_dry:
            command += ["--backend", backend]
        if self._is_dry:
            command += ["--tiny"]
        return [*command, *(word for s in sections for word in ("--only", s))]

    def tests(self, name: str, backend: str, limit_s: float, *, needed: bool = True) -> Step:
        """Of one backend those worth most, or all the others."""
        installed = importlib.util.find_spec("pytest") is not None
        absent = self._absent[backend] if installed else "pytest is not installed"
        command = arguments(
            files(FIRST) if backend else files(OTHERS, without=FIRST),
            device=self._device,
            backends=BACKENDS_OF_TESTS[self._device, backend],
            and_others=backend != "triton",
            test_s=TEST_S if backend else LONG_TEST_S,
            processes=min(TEST_PROCESSES, os.cpu_count() or 1),
            results=self._out / RESULTS,
            about=self._facts.about,
        )
        command = _python("-m", "pytest", *command)
        return self._step(name, command, limit_s, grace_s=20.0, absent=absent, needed=needed)

    def sanitizers(self, limit_s: float) -> list[Step]:
        """Beside the tests: nothing is timed there."""
        found = tool(SANITIZER)
        absent = self._absent["cuda"] or ("" if found else f"{SANITIZER} was not found")
        options = ["--error-exitcode", "9", "--report-api-errors", "no", "--print-limit", "20"]
        options += ["--target-processes", "application-only"]
        watched = _smoke("cuda", self._device, *WATCHED)
        return [
            self._step(
                name,
                [found, "--tool", name, *options, *watched],
                limit_s,
                beside=True,
                absent=absent,
                # every tensor an allocation of its own: within torch's pools nothing is out of
                # bounds
                environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )
            for name in TOOLS
        ]

    def profile(self, limit_s: float) -> Step:
        """Hardware counters of eight launches, at the clock that the card has anyway."""
        absent = self._absent["cuda"] or ("" if tool(PROFILER) else f"{PROFILER} was not found")
        command = _python(
            "-m", "benchmarks.gpu.profiling", str(self._out / profiling.REPORT), self._facts.about
        )
        return self._step("profile", command, limit_s, absent=absent)


def _python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def _smoke(backend: str, device: str, *dtypes: str) -> list[str]:
    command = _python("-m", "benchmarks.gpu.smoke", "--device", device)
    if device != "cpu":
        command += ["--backend", backend]
    return [*command, *(word for dtype in dtypes for word in ("--dtype", dtype))]


def _here(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # threads that spin while they wait keep the processes beside them from running
    return {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "passive", **more}
