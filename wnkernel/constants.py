"""Tensors with one number everywhere, which stand for g where it is no parameter."""

from __future__ import annotations

import torch
from torch import Tensor

from . import streams

KEPT = 1024
"""How many constants are kept; when there are as many, all are dropped."""

_kept: dict[tuple[object, ...], Tensor] = {}


class Constants:
    """The constants for launches on the current stream of one device. They are kept for later
    launches, so that a step fills no memory, and a GPU launches nothing else."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = streams.current_stream(device)
        # Memory that is allocated while a graph is captured belongs to the graph.
        self._may_keep = not streams.is_capturing(device)

    def get(
        self, number: float, shape: tuple[int, ...], dtype: torch.dtype, use: str = ""
    ) -> Tensor:
        """A tensor with ``number`` everywhere, which nobody may write to. Each use has its own."""
        key = number, shape, dtype, self._device, self._stream, use
        found = _kept.get(key) if self._may_keep else None
        if found is None:
            with torch.inference_mode(False):
                found = torch.full(shape, number, dtype=dtype, device=self._device)
            if self._may_keep:
                if len(_kept) >= KEPT:
                    _kept.clear()
                found = _kept.setdefault(key, found)
        return found
