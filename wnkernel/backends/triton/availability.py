"""Whether Triton kernels can run here, and on which tensors."""

from __future__ import annotations

import importlib
import os
from functools import cache

import torch
from torch.compiler import assume_constant_result

from ..._versions import untried
from ...streams import GPUS

OLDEST = (3, 4)
"""The tiles of a list are a compile-time tuple of tuples, which came with this one (torch 2.8)."""

OLDEST_CUDA = (8, 0)
"""Compute capability that Triton supports."""


@cache
def missing() -> str:
    """Why there are no kernels at all; empty when there are."""
    if reason := untried():
        return reason
    try:
        triton = importlib.import_module("triton")
    except Exception as error:  # whatever a broken installation raises
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
    except Exception as error:  # no compiler, no Python.h, no libcuda.so, two kinds of GPUs
        return (
            "triton cannot build its driver, for which it needs a C compiler and Python's headers: "
            f"{error}"
        )
    return ""


def is_interpreted() -> bool:
    """Whether TRITON_INTERPRET runs kernels on the CPU, for tests."""
    from .tile import INTERPRETED

    return INTERPRETED.value


@assume_constant_result  # torch.compile need not know how this is found out
def takes(device: torch.device) -> bool:
    """Whether the kernels can take tensors on ``device``."""
    if _is_elsewhere(device) or missing():
        return False
    if is_interpreted():
        return device.type == "cpu"
    return device.type in GPUS and not _is_too_old(device)


@assume_constant_result
def reason(device: torch.device) -> str:
    """Why they cannot."""
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
    """Whether kernels cannot run there, as far as that is known without importing Triton."""
    return device.type not in GPUS and os.environ.get("TRITON_INTERPRET", "0") in ("", "0")


def _is_too_old(device: torch.device) -> bool:
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device) < OLDEST_CUDA


def _has_xpu() -> bool:
    return hasattr(torch, "xpu") and torch.xpu.is_available()
