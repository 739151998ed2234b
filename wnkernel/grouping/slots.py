"""A slot: ``w`` of one weight, and what ``v`` and ``g`` were when it was computed.

A slot serves ``w`` as long as nothing shows that it would come out differently today: ``v``, ``g``
and ``w`` itself are the same objects with the same storage, sizes, strides, dtype,
``requires_grad`` and version counter. The check is a handful of comparisons, whatever
the size. csrc/slot.cpp is the twin for installations with ``wnkernel._C``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from .. import native
from ..problem import version_of

ALONE = -1
"""The launch mode in which every weight is to be computed on its own."""


class _Seen:
    """A tensor as it was at one moment. Holding the storage keeps another from its address."""

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
        """``w``, or None if it is out of date."""
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
    if (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or _calls_are_watched()
    ):
        return ALONE
    mode = 0
    for bit in (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    ):
        mode = 2 * mode + bit
    return mode


def _calls_are_watched() -> bool:
    """Whether a ``__torch_function__`` mode wants to see every call. The one of
    ``torch.set_default_device`` does not: it looks at functions that make tensors."""
    return torch._C._len_torch_function_stack() > 0 and any(
        type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()
    )


slots = _python_slots if native.slots is None else native.slots
"""``slots(ws, vs, gs)``: a slot for each weight of a launch."""

launch_mode = _python_launch_mode if native.launch_mode is None else native.launch_mode
"""What a weight depends on besides its parameters, as one number: grad mode, inference mode, the
deterministic setting. :data:`ALONE` under function transforms, ``__torch_dispatch__`` modes and
tracers, whose tensors must not outlive them, and under ``__torch_function__`` modes, which are to
see every call."""
