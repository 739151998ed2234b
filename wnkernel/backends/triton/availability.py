"""Whether Triton kernels can run here, and on which tensors."""

from __future__ import annotations

import importlib
import os
from functools import cache

import torch
from torch.compiler import assume_constant_result

from ..._versions import untried

OLDEST = (3, 4)
"""The tiles of a list are a compile-time tuple of tuples, which came with this one (torch 2.8)."""

OLDEST_CUDA = (8, 0)
"""Compute capability that Triton supports."""


GPUS = ("cuda", "xpu")
"""Types of devices."""


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
def reason(device: torch.device) -> str:
    """Why the kernels cannot take tensors on ``device``; empty when they can."""
    elsewhere = f"v is on {device}, its kernels run on GPUs"
    if device.type not in GPUS and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        return elsewhere  # without importing Triton
    if found := missing():
        return found
    if is_interpreted():
        on_cpu = device.type == "cpu"
        return "" if on_cpu else f"v is on {device}, and TRITON_INTERPRET runs kernels on the CPU"
    if device.type not in GPUS:
        return elsewhere
    if device.type == "cuda" and torch.version.hip is None:
        have = torch.cuda.get_device_capability(device)
        if have < OLDEST_CUDA:
            have, need = (".".join(map(str, c)) for c in (have, OLDEST_CUDA))
            return f"v is on a GPU of compute capability {have}, triton supports {need} and later"
    return ""


def _has_xpu() -> bool:
    return hasattr(torch, "xpu") and torch.xpu.is_available()
