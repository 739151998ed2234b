"""What is installed, which backends run and why others cannot: the facts of a bug report."""

from __future__ import annotations

import platform
from typing import Any, TypedDict

import torch

from . import installation, native
from ._version import __version__
from ._versions import limits
from .backends import BACKENDS, choice


class Info(TypedDict):
    """The entries of the dict that :func:`info` returns."""

    wnkernel: str
    torch: str
    python: str
    platform: str
    limits: list[str]
    """The features that this version of torch lacks, in words."""
    threads: int
    """How many CPU threads torch uses, and so how many the CPU kernels may use."""
    compiled: dict[str, Any] | None
    """What the compiled module was built with (torch, compiler, devices) and the instruction set
    that it uses; None if it is not loaded."""
    load_error: str
    """Why the compiled module is not loaded; empty if it is."""
    build_command: str
    """The command that would build and install the compiled module for this torch; empty if it is
    loaded or if this version of torch was not tried."""
    backends: dict[str, list[str]]
    """For every backend, in the order of the automatic choice, the reasons why it cannot run here.
    The list of reasons is empty if the backend can run."""
    cpu: dict[str, Any] | None
    """The sizes in bytes of the caches (``l1d``, ``l2``, ``l3``: as much as one thread may count
    on) and of a ``page``, and the ``sources`` of these sizes; None without the compiled module."""
    cpu_buffers: dict[str, int]
    """The result of :func:`wnkernel.cpu_buffers`."""
    triton: dict[str, int] | None
    """How many variants of the Triton kernels this process has launched, and how many one
    combination of dtypes can have; None if the Triton kernels cannot run."""
    forced_backend: str | None
    """The backend that was chosen by name on this thread, or None."""


def info() -> Info:
    """Describe the installation: versions, the compiled module and every backend.

    Returns:
        A dict of plain JSON types, with the keys of :class:`Info`.
    """
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
