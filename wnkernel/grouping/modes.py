"""What weights depend on besides their parameters: a launch for each."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import choice
from ..streams import current_stream, is_capturing
from .slots import ALONE, launch_mode


@dataclass(frozen=True, eq=False)
class Mode:
    """Equal modes are the same object."""

    flags: int
    """See :data:`wnkernel.grouping.slots.launch_mode`."""
    backend: str | None
    """The one that was asked for."""
    out_dtype: torch.dtype | None
    """None: that of v."""
    stream: int
    """Results are ready in the order of a stream only."""
    capturing: bool
    """Whether the stream is being captured into a graph."""


@functools.cache
def _mode(
    flags: int,
    backend: str | None = None,
    out_dtype: torch.dtype | None = None,
    stream: int = 0,
    capturing: bool = False,
) -> Mode:
    return Mode(flags, backend, out_dtype, stream, capturing)


def current_mode(v: Tensor, out_dtype: torch.dtype | None) -> Mode | None:
    """The mode for v's device; None: results may not outlive what runs now, or cannot be told
    apart from those of another stream."""
    flags = launch_mode()
    if flags == ALONE:
        return None
    if v.is_cpu:
        return _mode(flags, choice.forced, out_dtype)
    stream = current_stream(v.device)
    if stream is None:
        return None
    return _mode(flags, choice.forced, out_dtype, stream, is_capturing(v.device))
