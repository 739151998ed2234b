"""The device that kernels are launched on: element types, uploads, threads of a program."""

from __future__ import annotations

import threading
from collections import deque
from functools import cache

import torch
import triton
from torch import Tensor

from ...streams import is_capturing
from .launch_table import THREADS
from .tile import INTERPRETED

RESERVE = 1 << 17
"""Numbers in a reserve of pinned memory at least: 1 MiB."""

CAPTURES = 4
"""Captures of everything that this process launches, for which the reserve lasts without another
launch in between."""

MOST = 1 << 23
"""Numbers that are kept ready at most: 64 MiB."""

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
        self._wanted = RESERVE // 2
        self._expected: deque[int] = deque(maxlen=64)
        self._lock = threading.Lock()

    def expect(self, numbers: int) -> None:
        """Captures are going to take so many numbers more than was said before."""
        with self._lock:
            self._expected.append(numbers)
            self._wanted = max(RESERVE // 2, min(CAPTURES * sum(self._expected), MOST))

    def refill(self, device: torch.device) -> None:
        """See to the reserve. Called at every launch outside of captures, in case one follows."""
        if self._left >= self._wanted or device.type == "cpu":
            return
        with self._lock:
            if self._left < self._wanted:
                self._add(2 * self._wanted)

    def copy(self, memory: Tensor, device: torch.device) -> Tensor:
        """A copy of ``memory`` (int64, contiguous) on a device."""
        if device.type == "cpu":
            return memory
        if is_capturing(device):
            pinned = self._take(memory.numel()).view(memory.shape).copy_(memory)
        else:
            pinned = memory.pin_memory()
        return pinned.to(device, non_blocking=True)

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
