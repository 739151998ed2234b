"""A slot: ``w`` of one weight, and the state of ``v`` and ``g`` when it was computed.

A slot gives ``w`` as long as ``v``, ``g`` and ``w`` are the same objects with the same storage,
sizes, strides, dtype, ``requires_grad`` and version counter. The check takes a handful of
comparisons, whatever the size. csrc/slot.cpp is the twin for installations with ``wnkernel._C``.

The mode is everything that a weight depends on besides its parameters, and each mode has slots of
its own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import native
from ..backends import choice
from ..observers import are_calls_watched, is_followed
from ..problem import version_of
from ..streams import current_stream, is_capturing

ALONE = -1
"""The launch mode in which every weight is computed alone."""


class _Seen:
    """A tensor with its state at one moment. It holds the storage, so that no other storage gets
    its address."""

    __slots__ = ("_facts", "_storage", "tensor")

    def __init__(self, t: Tensor) -> None:
        self.tensor = t
        self._storage = t.untyped_storage()
        self._facts = _facts(t)

    def is_current(self, t: Tensor) -> bool:
        return t is self.tensor and _facts(t) == self._facts


def _facts(t: Tensor) -> tuple[object, ...]:
    storage = t.untyped_storage()._cdata
    state = t.dtype, t.requires_grad, version_of(t)
    return storage, t.data_ptr(), t.shape, t.stride(), *state


class PythonSlot:
    """``w`` of one launch with the ``v`` and ``g`` that it was computed from."""

    __slots__ = ("_g", "_v", "_w", "taken")

    def __init__(self, w: Tensor, v: Tensor, g: Tensor) -> None:
        self._w, self._v, self._g = _Seen(w), _Seen(v), _Seen(g)
        self.taken = False
        """Whether :meth:`take` ever returned ``w``."""

    def is_current(self, v: Tensor, g: Tensor) -> bool:
        """Whether ``w`` is what a computation from ``v`` and ``g`` would give now."""
        return (
            self._v.is_current(v) and self._g.is_current(g) and self._w.is_current(self._w.tensor)
        )

    def take(self, v: Tensor, g: Tensor) -> Tensor | None:
        """Return ``w``, or None if it is out of date."""
        if not self.is_current(v, g):
            return None
        self.taken = True
        return self._w.tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the memory of ``w``."""
        return self._w.tensor.untyped_storage().nbytes()


def _python_slots(
    ws: Sequence[Tensor], vs: Sequence[Tensor], gs: Sequence[Tensor]
) -> list[PythonSlot]:
    return [PythonSlot(*weight) for weight in zip(ws, vs, gs, strict=True)]


def _python_launch_mode() -> int:
    if is_followed() or are_calls_watched():
        return ALONE
    mode = 0
    for bit in (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    ):
        mode = 2 * mode + bit
    return mode


slots = _python_slots if native.slots is None else native.slots
"""``slots(ws, vs, gs)`` makes a slot for each weight of a launch."""

launch_mode = _python_launch_mode if native.launch_mode is None else native.launch_mode
"""``launch_mode()`` gives grad mode, inference mode and the deterministic setting as one number. It
gives :data:`ALONE` under function transforms, ``__torch_dispatch__`` modes and tracers, whose
tensors must not outlive them, and under ``__torch_function__`` modes, which must see every call."""


@dataclass(frozen=True, eq=False)
class Mode:
    """Everything that a weight depends on besides its parameters. Equal modes are the same
    object."""

    flags: int
    """The result of :data:`launch_mode`."""
    backend: str | None
    """The backend that was chosen by name, or None."""
    out_dtype: torch.dtype | None
    """The dtype of ``w``; None means that of v."""
    stream: int
    """The current stream, because results are ready only for later work on the same stream."""
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
    """The current mode for v's device. It is None if results may not be kept, or cannot be told
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
