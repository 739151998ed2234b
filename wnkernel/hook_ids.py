"""The numbers of hooks in modules that were pickled by another process.

A module keeps each of its hooks under a number, and every process counts from zero. So a hook that
is registered on an unpickled module could get the number of a pickled hook and replace it.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.utils.hooks import RemovableHandle

_KEPT_IN = [attribute for attribute in vars(nn.Module()) if attribute.endswith("_hooks")]
"""The attributes of a module that are dicts of hooks."""


def last_hook_id(modules: Iterable[nn.Module]) -> int:
    """The highest number that a hook of these modules has; -1 if there is none."""
    return max(
        (n for module in modules for hooks in _KEPT_IN for n in getattr(module, hooks)), default=-1
    )


def count_on_from(last: int) -> None:
    """Make all hooks that are registered from now on get higher numbers than ``last``."""
    RemovableHandle.next_id = max(RemovableHandle.next_id, last + 1)
