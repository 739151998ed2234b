"""Tells whether Triton kernels can run on this machine, and on which devices."""

from __future__ import annotations

import importlib
import os
from functools import cache

import torch
from torch.compiler import assume_constant_result

from ..._versions import untried
from ...streams import GPUS

OLDEST = (3, 4)
"""The oldest Triton version (of torch 2.8) that takes a tuple of tuples at compile time. The tiles
of a list are passed like this."""

OLDEST_CUDA = (8, 0)
"""The lowest compute capability that Triton supports."""


@cache
def missing() -> str:
    """Return why no Triton kernel can run on this machine; empty if kernels can run."""
    if reason := untried():
        return reason
    try:
        triton = importlib.import_module("triton")
    except Exception as error:  # a broken installation can raise any type
        return f"triton cannot be imported: {error}"
    version = getattr(triton, "__version__", "0")
    if tuple(int(n) for n in version.split(".")[:2] if n.isdigit()) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"triton {version} is too old, {oldest} or later is needed"
    if is_interpreted():
        return ""
    if not (torch.cuda.is_available() or _has_xpu()):
        return "there is no GPU that torch can use"
    try:
        _ = triton.runtime.driver.active.utils
    # There may be no compiler, no Python.h or no libcuda.so, or two kinds of GPUs.
    except Exception as error:
        return (
            "triton cannot build its driver, for which it needs a C compiler and Python's headers: "
            f"{error}"
        )
    return ""


def is_interpreted() -> bool:
    """Return whether kernels run in the interpreter on the CPU, for tests (TRITON_INTERPRET)."""
    from .tile import INTERPRETED

    return INTERPRETED.value


@assume_constant_result  # torch.compile takes the result as a constant and traces nothing
def takes(device: torch.device) -> bool:
    """Return whether the kernels can run on tensors on ``device``."""
    if _is_elsewhere(device) or missing():
        return False
    if is_interpreted():
        return device.type == "cpu"
    return device.type in GPUS and not _is_too_old(device)


@assume_constant_result
def reason(device: torch.device) -> str:
    """Return why the kernels cannot run on tensors on ``device``."""
    if not _is_elsewhere(device):
        if found := missing():
            return found
        if is_interpreted():
            return f"v is on {device}, and TRITON_INTERPRET runs kernels on the CPU"
        if device.type in GPUS:
            capabilities = torch.cuda.get_device_capability(device), OLDEST_CUDA
            have, need = (".".join(map(str, capability)) for capability in capabilities)
            return f"v is on a GPU of compute capability {have}, triton supports {need} and later"
    return f"v is on {device}, its kernels run on GPUs"


def _is_elsewhere(device: torch.device) -> bool:
    """Return whether it is certain, without an import of Triton, that kernels cannot run on
    ``device``."""
    return device.type not in GPUS and os.environ.get("TRITON_INTERPRET", "0") in ("", "0")


def _is_too_old(device: torch.device) -> bool:
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device) < OLDEST_CUDA


def _has_xpu() -> bool:
    return hasattr(torch, "xpu") and torch.xpu.is_available()
