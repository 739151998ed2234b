"""``fuse(model)``: one launch for all weight norms of a model."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NoReturn

from torch import nn
from torch.compiler import is_dynamo_compiling

from .. import native
from ..census import OURS, TORCH, TORCH_HOOK, NormedParameter, census, originals, stacked_in
from ..lost_writes import end_watches
from ..parametrization import WeightNormList
from ..problem import check_module
from . import scopes
from .members import Container, Member, Roster
from .running import steps
from .threads import new_threads, threads_of

REUSE = ("forward", "version")
NEVER_CALLED = (nn.ModuleList, nn.ModuleDict)
"""Containers without a forward."""


class WeightNormGroup:
    """The weight norms of one model; made by :func:`fuse`."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._root: Container | None = None
        """The scope of :meth:`scope`."""

    @classmethod
    def of(cls, model: nn.Module) -> WeightNormGroup:
        """The group that a model was fused into; how to get that of a copy.

        Raises:
            TypeError: ``model`` is no module.
            ValueError: it was not passed to :func:`fuse`, and is no copy of such a model.
        """
        check_module("model", model)
        container = scopes.container_of(model)
        if container is None or not container.is_root():
            raise ValueError(
                f"model: expected one that fuse() was called with, got {type(model).__name__}"
            )
        group = cls(container.roster)
        group._root = container
        return group

    @property
    def layers(self) -> list[str]:
        """Names of the weights in the group that still exist, as they were when it was made."""
        return [m.name for ref in self._roster.members if (m := ref()) is not None]

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Within the block, weights are computed together and may be read any number of times.

        A forward of the model, or of a part of it with two or more of the weights, is a scope by
        itself. This one is for code that reads weights outside any forward, or that wants several
        forwards to share them. It belongs to the thread: no ``yield`` and no ``await`` in the
        block, or code that runs meanwhile is served from it.
        """
        container, state = self._root, threads_of(self._roster).current
        if container is None or is_dynamo_compiling():  # removed; graphs have their own launches
            yield
            return
        call = threading.Lock()
        with call:  # let go also if an interrupt comes within close()
            try:
                state.enter(container, call)
                yield
            finally:
                state.close(self._roster, call)

    def refresh(self) -> None:
        """Compute every weight anew at its next read, in all threads."""
        self._roster.latest_refresh = object()
        threads_of(self._roster).current.drop()

    def memory(self) -> dict[str, int]:
        """What the group holds at this moment.

        Returns:
            ``slots``: weights that are computed and can be read again, in all threads;
            ``slot_bytes``: their memory; ``idle_bytes``: memory on the CPU that served results of
            this process before and waits for the next ones (:func:`wnkernel.cpu_buffers`).
        """
        states = threads_of(self._roster).registry.states()
        held = [slot for state in states for slot in state.slots()]
        return {
            "slots": len(held),
            "slot_bytes": sum(slot.nbytes for slot in held),
            "idle_bytes": native.cpu_buffers().get("held_bytes", 0),
        }

    def remove(self) -> None:
        """Give the plain weight-normed layers back, each computed on its own. Safe to repeat,
        and while other threads are in a forward, which read their next weights one by one."""
        self._roster.remove()
        for member in (ref() for ref in self._roster.members):
            weights = None if member is None else member.weights()
            if weights is not None and weights.owner is member:
                weights.bucket, weights.casts = None, False
                weights.owner = None  # last: by it the next call knows what is left to do
        for container in reversed([ref() for ref in self._roster.containers]):  # the root last
            module = None if container is None else container.module()
            if module is not None and scopes.container_of(module) is container:
                scopes.detach(module)
        self._root = None

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"group: expected an attribute of WeightNormGroup, got {name!r}; fuse(model) changes "
            "the model in place and returns its group, so go on with the model",
            name=name,
            obj=self,
        )

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        """Say that a group is no model.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "fuse(model) changes the model in place and returns its group, which cannot be called: "
            "write fuse(model), then model(x)"
        )

    def __getstate__(self) -> dict[str, Any]:
        # The model comes first: pickling a container (see pickling.py) expects it to be begun.
        model = None if self._root is None else self._root.module()
        return {"model": model, "root": self._root}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._root = state["root"]
        of_nobody = Roster(nn.Module(), "forward", False, new_threads)  # as after remove()
        self._roster = of_nobody if self._root is None else self._root.roster

    def __repr__(self) -> str:
        return f"WeightNormGroup({len(self.layers)} weights, reuse={self._roster.reuse!r})"


def fuse(
    model: nn.Module,
    *,
    reuse: Literal["forward", "version"] = "forward",
    bucket_cap_mb: float | None = None,
    autocast: bool = False,
) -> WeightNormGroup:
    """Compute all weight norms of a model in one launch, forward and backward.

    The first weight that a forward reads computes all that it will read (those that its previous
    forward read; all, the first time), and one autograd node gives all their gradients. Values and
    gradients have the bits of the single weights. Everything else stays as it is: parameters,
    keys, hooks, layers called on their own.

    Args:
        model: a module with layers normed by :func:`wnkernel.weight_norm`. Layers added later are
            not in the group: ``remove()`` it and fuse again.
        reuse: how long computed weights serve. ``"forward"``: until the outermost forward ends, so
            that every change of a parameter between two of them counts, however it was made.
            ``"version"``: until a parameter changes visibly or a torch optimizer steps, for
            discriminators that run twice per step, gradient accumulation and frozen models.
            docs/fuse.md lists the changes that this mode cannot see.
        bucket_cap_mb: at most this many MiB of v in one launch, so that gradients of the last
            layers are there before the backward is done (DistributedDataParallel sends them
            meanwhile). None: one launch for each device and autocast dtype.
        autocast: under autocast, write weights directly in its dtype, which saves the cast. The
            bits are those of the cast; gradients of a weight that is used twice add up in that
            dtype.

    Returns:
        The group. It need not be kept; the model holds what it needs.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: no weight-normed layers, or a wrong ``reuse`` or ``bucket_cap_mb``.
        RuntimeError: a layer is in a group already.
    """
    _check(model, reuse, bucket_cap_mb, autocast)
    found = _weights(model)
    end_watches(weights for _, weights, _ in found)
    steps.watch()
    roster = Roster(model, reuse, autocast, new_threads)
    buckets = _buckets([weights for _, weights, _ in found], bucket_cap_mb)
    group = WeightNormGroup(roster)
    try:
        for (name, weights, around), bucket in zip(found, buckets, strict=True):
            weights.owner = Member(roster, weights, name, bucket, around)
            weights.bucket, weights.casts = bucket, autocast
        index = {id(weights): k for k, (_, weights, _) in enumerate(found)}
        for module in model.modules():
            members = [index[id(m)] for m in module.modules() if id(m) in index]
            if module is model or (len(members) > 1 and not isinstance(module, NEVER_CALLED)):
                container = Container(roster, module, members)
                scopes.attach(module, container)
                if module is model:
                    group._root = container
    except BaseException:
        group.remove()
        raise
    return group


def _check(model: object, reuse: object, bucket_cap_mb: object, autocast: object) -> None:
    check_module("model", model)
    if reuse not in REUSE:
        raise ValueError(f"reuse: expected one of {', '.join(REUSE)}, got {reuse!r}")
    if not isinstance(autocast, bool):
        raise TypeError(f"autocast: expected a bool, got {type(autocast).__name__}")
    if bucket_cap_mb is None:
        return
    if not isinstance(bucket_cap_mb, (int, float)) or isinstance(bucket_cap_mb, bool):
        raise TypeError(
            f"bucket_cap_mb: expected a number or None, got {type(bucket_cap_mb).__name__}"
        )
    if not 0 < bucket_cap_mb < math.inf:
        raise ValueError(f"bucket_cap_mb: expected a finite number > 0, got {bucket_cap_mb}")


def _weights(model: nn.Module) -> list[tuple[str, WeightNormList, list[nn.Module]]]:
    """Every weight of this package beneath a module: its name, its parametrization list and the
    modules around it, innermost first.

    Raises:
        ValueError: there is none.
        RuntimeError: one of them is in a group already.
    """
    found = []
    others = set()
    modules = dict(model.named_modules())
    for normed in census(model):
        if normed.kind != OURS:
            others.add(normed.kind)
            continue
        why, weights = _why_not(normed), normed.weights
        if why or not isinstance(weights, WeightNormList):
            others.add(f"{normed.kind} {why or 'registered as a parametrization by hand'}")
            continue
        if weights.owner is not None and weights.owner.is_group:
            raise RuntimeError(
                f"model: expected layers outside any group, got {normed.path!r}, which is in one "
                "already; remove() that group first"
            )
        path = normed.path.removesuffix(normed.name).removesuffix(".")
        parts = path.split(".")
        around = [modules[".".join(parts[:k])] for k in range(len(parts), 0, -1)]
        found.append((normed.path, weights, [*around, model] if path else [model]))
    if not found:
        got = f"layers with {', '.join(sorted(others))} only" if others else "none"
        hint = (
            "" if others.isdisjoint((TORCH, TORCH_HOOK)) else "; call wnkernel.convert(model) first"
        )
        raise ValueError(f"model: expected layers with wnkernel.weight_norm, got {got}{hint}")
    return found


def _why_not(normed: NormedParameter) -> str | None:
    """Which parametrizations keep a weight norm of this package from a group; None: none do."""
    if len(stacked_in(normed.weights)) > 1:
        return "under other parametrizations"
    if not normed.is_alone:
        return "on top of other parametrizations"
    return None


def _buckets(weights: list[WeightNormList], cap_mb: float | None) -> list[int]:
    """The bucket of every weight, filled from the last one up: gradients come in that order."""
    bucket, filled = 0, 0
    buckets = []
    for entry in reversed(weights):
        size = originals(entry)[1].nbytes
        if cap_mb is not None and filled and filled + size > cap_mb * 2**20:
            bucket, filled = bucket + 1, 0
        filled += size
        buckets.append(bucket)
    return buckets[::-1]
