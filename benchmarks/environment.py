"""The facts that identify a result: device, torch, triton, commit, threads, backend."""

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
# These tell CPUs apart that have the same name: the first two on x86, the others on Arm.
CPU_NUMBERS = ("cpu family", "model", "CPU implementer", "CPU part")
FILLER = re.compile(r"\((r|tm)\)|\b(processor|cpu|\d+-core)\b|@.*", re.IGNORECASE)
SOURCES = ("csrc", "wnkernel", "benchmarks")
SUFFIXES = (".cpp", ".cu", ".cuh", ".h", ".py")


@dataclass(frozen=True)
class Environment:
    """The place where a run happens."""

    device: torch.device
    device_name: str
    torch: str
    triton: str  # The version; empty if it is not installed.
    commit: str  # See :func:`commit`.
    threads: int
    backend: str  # The backend of wnkernel that the automatic choice takes first.

    @property
    def own_kernels(self) -> bool:
        """Whether our backend runs compiled kernels here, not torch's operators rearranged."""
        return self.backend != "eager"

    def settle(self) -> None:
        """Prepare this process: set torch's threads, the current device and full float32."""
        torch.set_num_threads(self.threads)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # events are recorded on the current device
            # Rounding in convolutions would hide a wrong weight and reject a right one.
            torch.backends.cudnn.allow_tf32 = False


def environment(device: str, threads: int | None) -> Environment:
    """Set the number of threads and the device of this process, and describe this machine. Raises
    ValueError if torch does not know the device, or cannot use it here."""
    try:
        chosen = torch.empty(1, device=device).device  # with an index, if the device has one
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
    """Return what the system says about its first CPU; empty if it says nothing."""
    try:
        first, _, _ = CPUINFO.read_text().partition("\n\n")
    except OSError:
        return {}
    fields = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in fields}


def results_folder(where: Environment) -> str:
    """Return this machine's folder below ``benchmarks/results``. Virtual machines often call their
    CPU "Intel(R) Xeon(R) Processor", and Arm has no names. If a name has no number that could be a
    model's, the numbers of :data:`CPU_NUMBERS` follow it."""
    words = [where.device_name]
    if where.device.type == "cpu":
        words = ["cpu", FILLER.sub(" ", where.device_name)]
        if not re.search(r"\d{3}", where.device_name):
            facts = _cpuinfo()
            words += [facts[field] for field in CPU_NUMBERS if field in facts]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def version_of(*distributions: str) -> str:
    """Return the version of the first of these packages that is installed; empty if none is."""
    for name in distributions:
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return ""


def commit() -> str:
    """Return the commit's short hash, with ``+`` if the tree has changes. Outside a git checkout it
    is the variable ``WNKERNEL_COMMIT``, or else ``sources`` and a :func:`sources_hash`."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("WNKERNEL_COMMIT") or f"sources {sources_hash(ROOT)}"


def sources_hash(root: Path) -> str:
    """Hash the sources of kernels, package and benchmarks below a folder. The hash of a copy
    without git equals that of a checkout of the same commit."""
    digest = hashlib.sha256()
    files = (p for folder in SOURCES for p in (root / folder).rglob("*") if p.suffix in SUFFIXES)
    for path in sorted(files):
        if path.name != "_build_info.py":  # the build writes this file
            name, text = path.relative_to(root).as_posix().encode(), path.read_bytes()
            digest.update(b"%d %s %d " % (len(name), name, len(text)) + text)
    return digest.hexdigest()[:12]
