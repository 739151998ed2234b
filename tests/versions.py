"""Tests that a torch cannot hold, by no fault of ours."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from wnkernel._versions import LIMITS, release

if release(torch.__version__) >= (2, 5):
    from torch.distributed.tensor import (
        DTensor,
        Replicate,
        Shard,
        distribute_module,
        distribute_tensor,
    )
else:
    from torch.distributed._tensor import (
        DTensor,
        Replicate,
        Shard,
        distribute_module,
        distribute_tensor,
    )

__all__ = [
    "DTensor",
    "Replicate",
    "Shard",
    "attributes_are_guarded",
    "distribute_module",
    "distribute_tensor",
    "fully_shard_on_cpus",
    "layers_in_graphs",
    "load_pre_hook",
    "needs",
    "since",
]


def since(version: str, reason: str) -> pytest.MarkDecorator:
    """Leaves a test out with an older torch.

    Args:
        version: the first torch that holds it, as ``"2.6"``.
        reason: what is wrong with the others, for whoever reads the results.
    """
    return pytest.mark.skipif(release(torch.__version__) < release(version), reason=reason)


def needs(name: str) -> pytest.MarkDecorator:
    """Leaves a test out with a torch that lacks what stands under a name in ``LIMITS``."""
    limit = LIMITS[name]
    return since(".".join(map(str, limit.since)), limit.what)


def load_pre_hook(module: nn.Module, hook: Callable[..., None]) -> None:
    """``register_load_state_dict_pre_hook``, which is private before torch 2.5."""
    module._register_load_state_dict_pre_hook(hook, with_module=True)


fully_shard_on_cpus = since(
    "2.9",
    "on CPUs, fully_shard does not run before torch 2.7, and torch 2.7 and 2.8 give there the sum "
    "of all gradients, not their mean",
)

layers_in_graphs = needs("layers in graphs")

attributes_are_guarded = pytest.mark.skipif(
    release(torch.__version__) == (2, 11) and sys.version_info[:3] == (3, 13, 0),
    reason="with Python 3.13.0, a graph of torch 2.11 does not see attributes that a module gets "
    "after it was compiled",
)
