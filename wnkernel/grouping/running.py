"""What is running: calls that opened something, and steps of torch's optimizers.

torch's fused Adam, SGD and Adagrad write to parameters without a trace in their version counters,
and so does any optimizer that writes through ``.data``. What they have in common are the hooks
that ``torch.optim.Optimizer`` runs around every step of every subclass.
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

    Neither torch's modules nor its optimizers run their hooks after every exception, so what a
    hook began has to look for itself. A frame that has ended loses its local variables here.
    """
    if not isinstance(call, FrameType):
        return not call.locked()
    try:
        call.clear()
    except RuntimeError:  # refused, as it is being executed
        return False
    return True


class _Steps:
    def __init__(self) -> None:
        self.latest = object()
        """Another one after every beginning and end of a step of any optimizer, in any thread,
        since :meth:`watch` was called first. (Counts of two threads can come to the same.)"""
        self._running: dict[FrameType, None] = {}
        """Calls of ``step``, of all threads."""
        self._hooks: list[RemovableHandle] = []
        self._lock = threading.Lock()
        """Held while hooks are registered."""

    def watch(self) -> None:
        """Begin to look."""
        with self._lock:
            if not self._hooks:
                self._hooks = [
                    register_optimizer_step_pre_hook(self._begin),
                    register_optimizer_step_post_hook(self._end),
                ]

    def running(self) -> bool:
        """Whether an optimizer is within a step: it may write, and run the model, repeatedly."""
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
    """A note within a compiled step would compile it again and again, and is not needed: it leaves
    a trace in the version counters. Fused kernels do not, and are no part of a graph."""
    fused = any(group.get("fused") for group in optimizer.param_groups)
    return fused or not is_dynamo_compiling()


steps = _Steps()
