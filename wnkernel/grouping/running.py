"""Which calls and which steps of torch's optimizers are running.

torch's fused Adam, SGD and Adagrad write to parameters without a change of their version counters,
and so does any optimizer that writes through ``.data``. But every step of every subclass runs the
hooks of ``torch.optim.Optimizer``.
"""

from __future__ import annotations

import sys
import threading
from types import FrameType

import torch
from torch.compiler import is_dynamo_compiling
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle


def has_ended(call: FrameType | threading.Lock) -> bool:
    """Whether the call of a frame has returned or raised, or the ``with`` of a lock is over.

    Neither torch's modules nor its optimizers run their hooks after every exception, so this shows
    whether a call is over for which a hook has opened something. A frame that has ended loses its
    local variables here.
    """
    if not isinstance(call, FrameType):
        return not call.locked()
    try:
        call.clear()
    except RuntimeError:  # Python refuses this for a running frame
        return False
    return True


class _Steps:
    def __init__(self) -> None:
        self.latest = object()
        """An object that is replaced at every beginning and end of a step of any optimizer, in
        any thread, since the first call of :meth:`watch`. (Two threads could count to the same
        number.)"""
        self._running: dict[FrameType, None] = {}
        """The frames of calls of ``step`` that are running, in all threads."""
        self._hooks: list[RemovableHandle] = []
        self._lock = threading.Lock()
        """Held while hooks are registered."""

    def watch(self) -> None:
        """Register the hooks, if they are not registered yet."""
        with self._lock:
            if not self._hooks:
                self._hooks = [
                    register_optimizer_step_pre_hook(self._begin),
                    register_optimizer_step_post_hook(self._end),
                ]

    def running(self) -> bool:
        """Whether an optimizer step is running, which may write and run the model repeatedly."""
        for frame in list(self._running):
            if has_ended(frame):
                self._running.pop(frame, None)
        return bool(self._running)

    def _begin(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        if _is_noted(optimizer):
            self._note()
        if not is_dynamo_compiling():
            self._running[sys._getframe(1)] = None

    def _end(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        if _is_noted(optimizer):
            self._note()
        if not is_dynamo_compiling():
            self._running.pop(sys._getframe(1), None)

    @torch.compiler.disable
    def _note(self) -> None:
        self.latest = object()


def _is_noted(optimizer: Optimizer) -> bool:
    """Whether a step of an optimizer replaces ``latest``. In a compiled step that would cause a
    compilation every time. It is not needed there, because compiled code changes version counters.
    Fused kernels do not, but they are not part of a graph."""
    fused = any(group.get("fused") for group in optimizer.param_groups)
    return fused or not is_dynamo_compiling()


steps = _Steps()
