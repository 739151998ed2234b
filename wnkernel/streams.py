"""The current device, its streams, and captures of them into graphs, on GPUs of any kind."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

GPUS = {"cuda": "CUDA", "xpu": "XPU"}
"""The types of devices with streams, and their dispatch keys. torch calls AMD's devices cuda
too."""


def guard(device: torch.device) -> AbstractContextManager[object]:
    """A context that makes a GPU the current device."""
    if device.type not in GPUS:
        return nullcontext()
    module = getattr(torch, device.type)
    return nullcontext() if module.current_device() == device.index else module.device(device)


def current_stream(device: torch.device) -> int | None:
    """The current stream of a device, where its work is queued now. It is 0 if the device has only
    one stream, and None if its streams cannot be told apart."""
    if device.type == "cuda":
        return torch.cuda.current_stream(device).cuda_stream
    if device.type == "xpu":
        return torch.xpu.current_stream(device).sycl_queue
    return 0 if device.type in ("cpu", "meta", "mps") else None


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of a device is being captured into a graph."""
    module = _WITH_GRAPHS.get(device.type)
    if module is None or not module.is_initialized():
        return False
    with guard(device):  # torch answers for the current device
        return module.is_current_stream_capturing()


def captured_device() -> torch.device | None:
    """The current device, if its current stream is being captured."""
    for kind, module in _WITH_GRAPHS.items():
        if module.is_initialized() and module.is_current_stream_capturing():
            return torch.device(kind, module.current_device())
    return None


_WITH_GRAPHS: dict[str, Any] = {
    kind: module
    for kind in GPUS
    if hasattr(module := getattr(torch, kind, None), "is_current_stream_capturing")
}
