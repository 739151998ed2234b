"""The device that kernels are launched on: element types, uploads, threads of a program."""

from __future__ import annotations

import threading
from functools import cache

import torch
import triton
from torch import Tensor

from ...streams import is_capturing
from .launch_table import THREADS
from .tile import INTERPRETED

RESERVE = 1 << 17
"""Numbers in a reserve of pinned memory: 1 MiB, or the tables of ten training steps."""

ELEMENTS = {
    torch.float16: triton.language.float16,
    torch.bfloat16: triton.language.bfloat16,
    torch.float32: triton.language.float32,
    torch.float64: triton.language.float64,
}


class Uploads:
    """Copies of CPU memory to devices, from pinned memory, so that nothing waits.

    torch keeps pinned memory from being used again before a copy from it is done. A captured copy
    reads it at every replay instead, and nobody says when the graph is gone; so what is captured
    comes from a reserve that is never used again. The reserve is made outside of captures, in which
    older torch cannot allocate pinned memory.
    """

    def __init__(self) -> None:
        self._reserve: list[Tensor] = []
        self._left = 0
        self._lock = threading.Lock()

    def copy(self, memory: Tensor, device: torch.device) -> Tensor:
        """A copy of ``memory`` (int64, one-dimensional) on a device."""
        if device.type == "cpu":
            return memory
        if is_capturing(device):
            pinned = self._take(memory.numel()).copy_(memory)
        else:
            self._refill()
            pinned = memory.pin_memory()
        return pinned.to(device, non_blocking=True)

    def _refill(self, numbers: int = RESERVE) -> None:
        with self._lock:
            if self._left < numbers // 2:
                self._add(numbers)

    def _take(self, numbers: int) -> Tensor:
        with self._lock:
            if self._left < numbers:
                self._add(max(numbers, RESERVE))
            start = self._reserve[-1].numel() - self._left
            self._left -= numbers
            return self._reserve[-1][start : start + numbers]

    def _add(self, numbers: int) -> None:
        pinned = torch.empty(numbers, dtype=torch.int64, device="cpu", pin_memory=True)
        self._reserve.append(pinned)
        self._left = numbers


@cache
def warps(device: torch.device) -> int:
    """Warps of a program on a device, which has to be the current one."""
    if INTERPRETED.value:
        return 1
    return THREADS // triton.runtime.driver.active.get_current_target().warp_size
