"""The one form of this package's error messages, from Python and from C++: the argument, what was
expected, what came. ``g: expected shape [4, 1] ..., got [1, 1]``."""

from __future__ import annotations

import re

import torch

FLOATS = "float16, bfloat16, float32 or float64"


def here() -> torch.device:
    """Where the tests create their tensors."""
    return torch.empty(0).device


def message(argument: str, expected: str, got: str) -> str:
    """A pattern for one message."""
    return rf"^{re.escape(argument)}: expected .*{expected}.*got .*({got})"


def quantised(t: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)
