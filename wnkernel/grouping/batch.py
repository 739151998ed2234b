"""One launch: which members can be computed together, and their slots."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from .. import functional
from ..parametrization import classes_are_as_made
from .slots import PythonSlot, slots

if TYPE_CHECKING:
    from .members import Member, Roster

PLAIN = (Tensor, Parameter)
"""Types of v and g that a launch takes; subclasses (DTensor, say) are computed alone."""


def can_be_launched(v: Tensor | None, g: Tensor | None) -> bool:
    """Whether v and g are plain tensors with a version counter."""
    return type(v) in PLAIN and type(g) in PLAIN and not (v.is_inference() or g.is_inference())


class Bucket(NamedTuple):
    """What members of one launch have in common."""

    number: int
    """Its place among those that ``bucket_cap_mb`` makes."""
    device: torch.device
    out_dtype: torch.dtype | None
    unit: int | None
    """The module that gathers and frees their parameters as one (FSDP)."""


def bucket_of(member: Member, v: Tensor, sharding: tuple[type[nn.Module], ...]) -> Bucket:
    """Where a member belongs at this moment, given :func:`sharding_modules`."""
    unit = member.innermost(sharding) if sharding else None
    return Bucket(member.bucket, v.device, member.roster.out_dtype(v), unit)


def launch(
    roster: Roster, indices: Iterable[int], bucket: Bucket, present: list[PythonSlot | None]
) -> list[tuple[int, PythonSlot]]:
    """Compute the members among ``indices`` that belong to a bucket and have no slot that is up to
    date: one forward launch, one autograd node.

    Returns:
        Their slots. None at all if a weight has something wrong with it: read alone, it says what.
    """
    if not classes_are_as_made():
        return []
    sharding = sharding_modules()
    simple = not (sharding or roster.autocast)
    chosen, vs, gs, dims, eps = [], [], [], [], []
    for index in indices:
        member = roster.members[index]()
        weights = None if member is None else member.weights()
        if weights is None or member.bucket != bucket.number or not weights.is_untouched():
            continue
        parameters = weights._parameters
        v, g = parameters.get("original1"), parameters.get("original0")
        if not can_be_launched(v, g) or v.device != bucket.device:
            continue
        if not simple and bucket_of(member, v, sharding) != bucket:
            continue
        norm, slot = weights._modules["0"], present[index]
        if slot is not None and slot.is_current(v, g):
            continue
        chosen.append(index)
        vs.append(v)
        gs.append(g)
        dims.append(norm.dim)
        eps.append(norm.eps)
    try:
        with _version_counters():
            ws = functional.weight_norms(vs, gs, dims, eps=eps, out_dtype=bucket.out_dtype)
    except (TypeError, ValueError):
        return []
    except RuntimeError:
        if all(map(_has_memory, (*vs, *gs))):  # no weight's fault: out of memory, say
            raise
        return []
    return list(zip(chosen, slots(list(ws), vs, gs), strict=True))


def _has_memory(t: Tensor) -> bool:
    return t.numel() == 0 or t.untyped_storage().nbytes() > 0


def _version_counters() -> AbstractContextManager[object]:
    """Results without gradients in inference mode too, but with a version counter: a write to one
    of them must not go unseen."""
    if not torch.is_inference_mode_enabled():
        return nullcontext()
    stack = ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.no_grad())
    return stack


def sharding_modules() -> tuple[type[nn.Module], ...]:
    """The classes of modules that shard their parameters, if any can be in use."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return ()
    found = (
        getattr(sys.modules.get(module), name, None)
        for module, name in (
            ("torch.distributed.fsdp", "FSDPModule"),
            ("torch.distributed._composable.fsdp", "FSDPModule"),  # before torch 2.6
            ("torch.distributed.fsdp", "FullyShardedDataParallel"),
        )
    )
    return tuple(kind for kind in found if kind is not None)
