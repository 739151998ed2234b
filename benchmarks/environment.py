"""What a result is keyed by: device, torch, commit, threads, backend."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

import wnkernel


@dataclass(frozen=True)
class Environment:
    """Where a run takes place."""

    device: torch.device
    device_name: str
    torch: str
    commit: str
    """Short hash, with ``+`` for a tree with changes; empty outside a git checkout."""
    threads: int
    backend: str
    """The backend of wnkernel that the automatic choice takes first."""

    @property
    def own_kernels(self) -> bool:
        """Whether ours are compiled kernels here, and not torch's operators in another order."""
        return self.backend != "eager"


def environment(device: str, threads: int | None) -> Environment:
    """Set the number of threads, and describe this machine.

    Raises:
        ValueError: torch does not know the device, or cannot use it here.
    """
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {device!r} cannot be used here: {error}") from None
    if threads is not None:
        torch.set_num_threads(threads)
    return Environment(
        device=chosen,
        device_name=_device_name(chosen),
        torch=torch.__version__,
        commit=_commit(),
        threads=torch.get_num_threads(),
        backend=_backend(chosen),
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _backend(device: torch.device) -> str:
    """The first backend that can run and is not for another device."""
    facts = wnkernel.info()
    runnable = [name for name, why in facts["backends"].items() if not why]
    other_devices = {"cpu", "cuda"} - {device.type}
    return facts["forced_backend"] or next(n for n in runnable if n not in other_devices)


def _commit() -> str:
    def git(*args: str) -> str:
        where = Path(__file__).parent
        done = subprocess.run(["git", *args], cwd=where, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return ""
