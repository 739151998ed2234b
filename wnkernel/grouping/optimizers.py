"""How often torch's optimizers began and ended a step.

torch's fused Adam, SGD and Adagrad write to parameters without a trace in their version counters,
and so does any optimizer that writes through ``.data``. What they have in common are the hooks
that ``torch.optim.Optimizer`` runs around every step of every subclass.
"""

from __future__ import annotations

import torch
from torch.compiler import is_dynamo_compiling
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle


class _Steps:
    def __init__(self) -> None:
        self.count = 0
        """Beginnings and ends of steps, of all optimizers, since :meth:`watch` was called first."""
        self.running: set[int] = set()
        """Optimizers within a step: it may write, and run the model, any number of times. One that
        raised stays here until its next step is done."""
        self._hooks: list[RemovableHandle] = []

    def watch(self) -> None:
        """Begin to count."""
        if not self._hooks:
            self._hooks = [
                register_optimizer_step_pre_hook(self._begin),
                register_optimizer_step_post_hook(self._end),
            ]

    def _begin(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        if _counts(optimizer):
            self._count(id(optimizer), True)

    def _end(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        if _counts(optimizer):
            self._count(id(optimizer), False)

    @torch.compiler.disable
    def _count(self, optimizer: int, begins: bool) -> None:
        self.count += 1
        if begins:
            self.running.add(optimizer)
        else:
            self.running.discard(optimizer)


def _counts(optimizer: Optimizer) -> bool:
    """A count within a compiled step would compile it again and again, and is not needed: it leaves
    a trace in the version counters. Fused kernels do not, and are no part of a graph."""
    fused = any(group.get("fused") for group in optimizer.param_groups)
    return fused or not is_dynamo_compiling()


steps = _Steps()
