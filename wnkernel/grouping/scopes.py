"""The hooks that make a module's forward a scope.

The hooks find the group through the module that they receive, so the copied hooks of a copied
module find the copy of the group, or none.

The hooks do nothing while Dynamo traces them, because graphs contain the plain operator. They ask
``is_dynamo_compiling``, since ``is_compiling`` is true on all threads while one compiles.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.compiler import is_dynamo_compiling

from .members import Container
from .threads import threads_of

ATTRIBUTE = "_weight_norm_container"

HOOK_ID = -17
"""The number of our hooks in every module. torch would number the hooks of every module
differently, and a compiler would then compile the code of a class again for each of its modules."""


def attach(module: nn.Module, container: Container) -> None:
    """Make the forward of ``module`` a scope."""
    detach(module)  # a copy of a part may have brought hooks along
    setattr(module, ATTRIBUTE, container)
    before: Any = module._forward_pre_hooks  # an OrderedDict
    after = module._forward_hooks
    before[HOOK_ID], after[HOOK_ID] = _enter, _leave
    before.move_to_end(HOOK_ID, last=False)
    module._forward_hooks_always_called[HOOK_ID] = True


def detach(module: nn.Module) -> None:
    """Undo :func:`attach`, also on a copy of the module. An interrupted call can be repeated."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        hooks.pop(HOOK_ID, None)
    module._forward_hooks_always_called.pop(HOOK_ID, None)
    module.__dict__.pop(ATTRIBUTE, None)


def container_of(module: nn.Module) -> Container | None:
    """The container that a group has for a module, or None."""
    return module.__dict__.get(ATTRIBUTE)


def _enter(module: nn.Module, args: Any) -> None:
    if is_dynamo_compiling():
        return
    container = container_of(module)
    if container is not None:
        threads_of(container.roster).current.enter(container, sys._getframe(1))


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    if is_dynamo_compiling():
        return
    container = container_of(module)
    if container is not None:
        state = threads_of(container.roster).current
        state.leave(container.roster, sys._getframe(1))
