"""What is built, what runs and why not: ``python -m wnkernel`` prints it, for every bug report."""

from __future__ import annotations

import platform
from typing import Any, TypedDict

import torch

from . import installation, native
from ._version import __version__
from ._versions import limits
from .backends import BACKENDS, choice


class Info(TypedDict):
    """What :func:`info` returns."""

    wnkernel: str
    torch: str
    python: str
    platform: str
    limits: list[str]
    """What this torch cannot do."""
    threads: int
    """How many threads the CPU kernels may use, which is how many torch uses."""
    compiled: dict[str, Any] | None
    """What the compiled module was built with (torch, compiler, devices), the instruction set in
    use; or None."""
    load_error: str
    """Why the compiled module is not loaded; empty when it is."""
    build_command: str
    """The command that would build and install it for this torch; empty where it is loaded or this
    torch was not tried."""
    backends: dict[str, list[str]]
    """For every backend, in the order of the automatic choice, the reasons why it cannot run here
    (empty: it can)."""
    cpu: dict[str, Any] | None
    """Bytes of the caches (``l1d``, ``l2``, ``l3``: what a thread may count on) and of a ``page``,
    and the ``sources`` of these facts; None without the compiled module."""
    cpu_buffers: dict[str, int]
    """Bytes that results on the CPU use and hold."""
    triton: dict[str, int] | None
    """Variants of the Triton kernels that this process has launched, and how many one combination
    of dtypes can come to; None where they cannot run."""
    forced_backend: str | None
    """The one asked for on this thread, or None."""


def info() -> Info:
    """Versions, the compiled module and every backend, as plain JSON types (:class:`Info`)."""
    triton: Any = BACKENDS["triton"]
    return {
        "wnkernel": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "limits": limits(torch.__version__),
        "threads": torch.get_num_threads(),
        "compiled": native.BUILD_INFO or None,
        "load_error": native.load_error(),
        "build_command": installation.command() if native.can_be_built() else "",
        "backends": {name: backend.missing() for name, backend in BACKENDS.items()},
        "cpu": native.MACHINE or None,
        "cpu_buffers": native.cpu_buffers(),
        "triton": triton.variants(),
        "forced_backend": choice.forced,
    }
