"""What a result is keyed by: device, torch, triton, commit, threads, backend."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from wnkernel.backends import choose

ROOT = Path(__file__).parent.parent
CPUINFO = Path("/proc/cpuinfo")
CPU_NUMBERS = ("cpu family", "model", "CPU implementer", "CPU part")
"""What tells CPUs apart whose name does not: the first two on x86, the others on Arm."""

FILLER = re.compile(r"\((r|tm)\)|\b(processor|cpu|\d+-core)\b|@.*", re.IGNORECASE)
SOURCES = ("csrc", "wnkernel", "benchmarks")
SUFFIXES = (".cpp", ".cu", ".cuh", ".h", ".py")


@dataclass(frozen=True)
class Environment:
    """Where a run takes place."""

    device: torch.device
    device_name: str
    torch: str
    triton: str  # Version; empty if it is not installed.
    commit: str  # See :func:`commit`.
    threads: int
    backend: str  # The backend of wnkernel that the automatic choice takes first.

    @property
    def own_kernels(self) -> bool:
        """Whether ours are compiled kernels here, and not torch's operators in another order."""
        return self.backend != "eager"

    def settle(self) -> None:
        """Let this process run there: torch's threads, the current device, full float32."""
        torch.set_num_threads(self.threads)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # events are recorded on the current device
            # what convolutions round off would hide a wrong weight, and fail a right one
            torch.backends.cudnn.allow_tf32 = False


def environment(device: str, threads: int | None) -> Environment:
    """Set the number of threads and the device of this process, and describe this machine.

    Raises:
        ValueError: torch does not know the device, or cannot use it here.
    """
    try:
        chosen = torch.empty(1, device=device).device  # with an index, if it can have one
        backend = choose(torch.empty(1, device=chosen)).name
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {device!r} cannot be used here: {error}") from None
    triton = version_of("triton", "pytorch-triton", "pytorch-triton-rocm")
    threads = torch.get_num_threads() if threads is None else threads
    name = _cpuinfo().get("model name") or platform.processor() or platform.machine()
    if chosen.type == "cuda":
        name = torch.cuda.get_device_name(chosen)
    about = name, torch.__version__, triton, commit(), threads
    where = Environment(chosen, *about, backend)
    where.settle()
    return where


def _cpuinfo() -> dict[str, str]:
    """What the system says of its first CPU; nothing where it does not tell."""
    try:
        first, _, _ = CPUINFO.read_text().partition("\n\n")
    except OSError:
        return {}
    fields = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in fields}


def results_folder(where: Environment) -> str:
    """Where below ``benchmarks/results`` the results of this machine belong: by its CPU or card.

    Virtual machines often call their CPU "Intel(R) Xeon(R) Processor", and Arm has no names. Where
    a name has no number in it that could be a model's, those of :data:`CPU_NUMBERS` follow.
    """
    words = [where.device_name]
    if where.device.type == "cpu":
        words = ["cpu", FILLER.sub(" ", where.device_name)]
        if not re.search(r"\d{3}", where.device_name):
            facts = _cpuinfo()
            words += [facts[field] for field in CPU_NUMBERS if field in facts]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def version_of(*distributions: str) -> str:
    """Of the first of these packages that is installed; empty if none is."""
    for name in distributions:
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return ""


def commit() -> str:
    """Short hash, with ``+`` for a tree with changes. Outside a git checkout, what the environment
    variable ``WNKERNEL_COMMIT`` says, or else ``sources`` and :func:`sources_hash`."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("WNKERNEL_COMMIT") or f"sources {sources_hash(ROOT)}"


def sources_hash(root: Path) -> str:
    """Of the sources of kernels, package and benchmarks below a folder: the same in a copy without
    git as in a checkout of the commit that it was made of."""
    digest = hashlib.sha256()
    files = (p for folder in SOURCES for p in (root / folder).rglob("*") if p.suffix in SUFFIXES)
    for path in sorted(files):
        if path.name != "_build_info.py":  # written by the build
            name, text = path.relative_to(root).as_posix().encode(), path.read_bytes()
            digest.update(b"%d %s %d " % (len(name), name, len(text)) + text)
    return digest.hexdigest()[:12]
