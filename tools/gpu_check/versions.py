"""Prints what a machine has, and what prevents steps from running.

``python -m tools.gpu_check.versions``, from the folder with setup.py. This is the first step. It
has a process of its own, because a broken card can hang any process that asks it. Every problem is
one line, and one more line is for later steps.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch

from benchmarks.environment import commit, version_of

from .tests_to_run import is_installed

FACTS = "FACTS "  # Begins the line that later steps read.
PROBLEM = "PROBLEM: "  # Begins each problem.
PACKAGES = (
    *("torch", "triton", "numpy", "pytest", "pytest-xdist", "pytest-timeout", "hypothesis"),
    *("transformers", "setuptools", "ninja", "pybind11"),
)

OLDEST_DRIVER = 530  # The driver of CUDA 12.1: older ones refuse the arguments of a list.
ENOUGH_BYTES = 12e9  # Of free memory. The largest copy takes 8.6 GB.


@dataclass(frozen=True)
class Facts:
    """The reasons why some steps cannot run; a reason is empty if they can."""

    no_build: str = ""
    no_cuda: str = ""
    no_triton: str = ""
    device: str = ""
    commit: str = ""

    @property
    def about(self) -> str:
        """The text that identifies the machine in all results."""
        return ", commit ".join(filter(None, (self.device or "no GPU", self.commit)))


def facts_of(lines: Sequence[str]) -> Facts:
    """Read the facts from the output of the step; without them everything is tried."""
    found = [line.removeprefix(FACTS) for line in lines if line.startswith(FACTS)]
    return Facts(**json.loads(found[-1])) if found else Facts()


def main() -> None:
    """Print the facts and problems."""
    cpu = _first(_output("sh", "-c", "grep -m1 'model name' /proc/cpuinfo | cut -d: -f2"))
    packages = ((name, version_of(name)) for name in PACKAGES)
    query = "name,driver_version,memory.total,memory.used,clocks.max.sm,clocks.max.memory"
    lines = (
        f"commit {commit()}, Python {platform.python_version()}, {platform.platform()}",
        f"{os.cpu_count()} cores, {cpu}",
        ", ".join(f"{name} {version or 'is not installed'}" for name, version in packages),
        f"torch's CUDA: {torch.version.cuda}",
        f"nvcc: {(_output('nvcc', '--version').splitlines() or [''])[-1]}",
        f"C++: {_first(_output(os.environ.get('CXX', 'c++'), '--version'))}",
        "nvidia-smi: " + _smi(f"--query-gpu={query}"),
    )
    print(*lines, sep="\n", flush=True)
    facts = Facts(no_build=no_build(), commit=commit())
    if torch.cuda.is_available():
        facts = _of_the_card(facts)
    print(FACTS + json.dumps(asdict(facts)))
    reasons = {"no build": facts.no_build, "no CUDA": facts.no_cuda, "no Triton": facts.no_triton}
    found = [f"{PROBLEM}{what}: {why}" for what, why in reasons.items() if why]
    print("\n".join(found) or "All steps can run.", flush=True)


def no_build() -> str:
    """Return why CUDA kernels cannot be built here; empty if they can."""
    if missing := [p for p in ("setuptools", "ninja", "pybind11") if not is_installed(p)]:
        return f"not installed: {', '.join(missing)}"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler})"
    import setup

    return setup.no_cuda()


def _of_the_card(facts: Facts) -> Facts:
    """Add the facts that only the card knows."""
    others = _smi("--query-compute-apps=pid,used_memory").splitlines()  # before this process joins
    try:
        facts = replace(facts, device=torch.cuda.get_device_name(0))
        print(f"card: {torch.cuda.get_device_properties(0)}", flush=True)
        capability = torch.cuda.get_device_capability(0)
        free, total = torch.cuda.mem_get_info(0)
        torch.zeros(1, device="cuda:0")
    except Exception as error:  # no memory for a context, a mode that forbids it, ...
        why = f"the card cannot be used: {_first(str(error))}"
        return replace(facts, no_cuda=why, no_triton=why)
    if free < ENOUGH_BYTES:
        print(
            f"{PROBLEM}{free / 1e9:.1f} of {total / 1e9:.1f} GB are free on the card, expected "
            f"{ENOUGH_BYTES / 1e9:.0f}: cases that need more will fail"
        )
    if others and others[0][:1].isdigit():
        print(f"{PROBLEM}the card is in use ({'; '.join(others)}): no figure can be trusted")
    driver = _smi("--query-gpu=driver_version")
    return replace(facts, no_cuda=no_cuda(capability, driver), no_triton=no_triton())


def no_cuda(capability: tuple[int, int], driver: str) -> str:
    """Return why CUDA kernels cannot run on a card, if that is known before the build."""
    import setup

    if capability < setup.OLDEST_GPU:
        have, need = (".".join(map(str, c)) for c in (capability, setup.OLDEST_GPU))
        return f"the card has compute capability {have}, {need} is needed"
    major = driver.split(".")[0]
    if major.isdigit() and int(major) < OLDEST_DRIVER:
        return f"the driver is {driver}, {OLDEST_DRIVER} or later is needed"
    return ""


def no_triton() -> str:
    """Return why Triton kernels cannot run; empty if they can."""
    from wnkernel.backends import BACKENDS

    reasons = BACKENDS["triton"].reasons(torch.empty(1, device="cuda"))
    return "; ".join(map(_first, reasons))


def _first(text: str) -> str:
    return next(iter(text.strip().splitlines()), "").strip()


def _smi(query: str) -> str:
    return _output("nvidia-smi", query, "--format=csv,noheader")


def _output(*command: str) -> str:
    """Return the output of a command, or why it has none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=8, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not found or not answering ({type(error).__name__})"
    return (done.stdout.strip() or done.stderr.strip()) or "nothing"


if __name__ == "__main__":
    main()
