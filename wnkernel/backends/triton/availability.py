"""Whether Triton kernels can run here, and on which tensors."""

from __future__ import annotations

import importlib
from functools import cache

import torch
from torch.compiler import assume_constant_result

OLDEST = (3, 3)
"""Tuples as arguments of device functions came with this one (torch 2.7)."""

OLDEST_CUDA = (8, 0)
"""Compute capability that Triton supports."""


@cache
def missing() -> str:
    """Why there are no kernels at all; empty when there are."""
    try:
        triton = importlib.import_module("triton")
    except Exception as error:  # whatever a broken installation raises
        return f"triton cannot be imported: {error}"
    version = getattr(triton, "__version__", "0")
    if tuple(int(n) for n in version.split(".")[:2] if n.isdigit()) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"triton {version} is too old, {oldest} or later is needed"
    if not (is_interpreted() or torch.cuda.is_available() or _has_xpu()):
        return "there is no GPU that torch can use"
    return ""


def is_interpreted() -> bool:
    """Whether TRITON_INTERPRET runs kernels on the CPU, for tests."""
    from .tile import INTERPRETED

    return INTERPRETED.value


@assume_constant_result  # torch.compile need not know how this is found out
def reason(device: torch.device) -> str:
    """Why the kernels cannot take tensors on ``device``; empty when they can."""
    if found := missing():
        return found
    if is_interpreted():
        on_cpu = device.type == "cpu"
        return "" if on_cpu else f"v is on {device}, and TRITON_INTERPRET runs kernels on the CPU"
    if device.type not in ("cuda", "xpu"):
        return f"v is on {device}, its kernels run on GPUs"
    if device.type == "cuda" and torch.version.hip is None:
        have = torch.cuda.get_device_capability(device)
        if have < OLDEST_CUDA:
            have, need = (".".join(map(str, c)) for c in (have, OLDEST_CUDA))
            return f"v is on a GPU of compute capability {have}, triton supports {need} and later"
    return ""


def _has_xpu() -> bool:
    return hasattr(torch, "xpu") and torch.xpu.is_available()
