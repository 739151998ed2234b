"""``fuse(model)``: one launch for all weight norms of a model."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NoReturn

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from .. import native
from ..census import OURS, TORCH, TORCH_HOOK, NormedParameter, normed_in, stacked_in
from ..forced_layers import forced_in
from ..keys import V
from ..lost_writes import end_watches
from ..parametrization import WeightNormList
from ..problem import check_module
from . import scopes
from .members import Container, Member, NormedList, Roster
from .running import steps
from .threads import new_threads, threads_of

REUSE = ("forward", "version")
NEVER_CALLED = (nn.ModuleList, nn.ModuleDict)
"""Containers without a forward."""


class WeightNormGroup:
    """The group of the weight norms of one model, which :func:`fuse` makes."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._root: Container | None = None
        """The container of the model, which :meth:`scope` opens; None after :meth:`remove`."""

    @classmethod
    def of(cls, model: nn.Module) -> WeightNormGroup:
        """Return the group of a model that was passed to :func:`fuse`, or of a copy of such a
        model, which has a group of its own.

        Raises:
            TypeError: if ``model`` is not a torch.nn.Module.
            ValueError: if the model was not passed to :func:`fuse`, and is no copy of such a model.
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
        """The names of the weights in the group that still exist, as they were when the group was
        made."""
        return [m.name for ref in self._roster.members if (m := ref()) is not None]

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Within the block, weights are computed together and may be read any number of times.

        Each forward of the model, or of a part of it with two or more of the weights, is a scope by
        itself. This method is for code that reads weights outside of any forward, or that shares
        the weights among several forwards. The scope belongs to the thread, so the block must
        contain no ``yield`` and no ``await``: other code that runs meanwhile would read weights
        from the scope.
        """
        container, state = self._root, threads_of(self._roster).current
        if container is None or is_dynamo_compiling():  # removed, or a graph has its own launches
            yield
            return
        call = threading.Lock()
        with call:  # it is released even if an interrupt comes within close()
            try:
                state.enter(container, call)
                yield
            finally:
                state.close(self._roster, call)

    def refresh(self) -> None:
        """Make all threads compute every weight again at its next read."""
        self._roster.latest_refresh = object()
        threads_of(self._roster).current.drop()

    def memory(self) -> dict[str, int]:
        """The memory that the group holds at this moment.

        Returns:
            ``slots``: the number of computed weights that can be read again, in all threads;
            ``slot_bytes``: their bytes; ``idle_bytes``: bytes on the CPU that served earlier
            results of this process and wait for the next ones (:func:`wnkernel.cpu_buffers`).
        """
        states = threads_of(self._roster).registry.states()
        held = [slot for state in states for slot in state.slots()]
        return {
            "slots": len(held),
            "slot_bytes": sum(slot.nbytes for slot in held),
            "idle_bytes": native.cpu_buffers().get("held_bytes", 0),
        }

    def remove(self) -> None:
        """Remove the group. The layers stay weight-normed, and each weight is computed alone again.
        This may be called repeatedly, and while other threads run a forward, which then compute
        their next weights one by one."""
        self._roster.remove()
        for member in (ref() for ref in self._roster.members):
            weights = None if member is None else member.weights()
            if weights is not None and weights.owner is member:
                weights.bucket, weights.casts = None, False
                weights.owner = None  # last, so that an interrupted call can be repeated
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
        """Raise an error, because a group is not a model.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "fuse(model) changes the model in place and returns its group, which cannot be called: "
            "write fuse(model), then model(x)"
        )

    def __getstate__(self) -> dict[str, Any]:
        # The model comes first, because a container (see pickling.py) is pickled within its model.
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

    When a forward reads its first weight, this computes all weights that it is likely to read:
    those of the previous forward, or all weights the first time. One autograd node gives all their
    gradients. Weights have the same bits as single ones, and so have gradients unless a forward
    uses a weight twice. Parameters, keys, hooks and layers that are called alone stay as they are.

    Args:
        model: a module with layers normed by :func:`wnkernel.weight_norm` or
            :func:`wnkernel.forced_weight_norm`. Layers that are added later are not in the group
            until it is removed by ``remove()`` and made again.
        reuse: how long computed weights are used. ``"forward"``: until the outermost forward ends,
            so that every change of a parameter between two forwards counts, however it was made.
            ``"version"``: until a parameter changes visibly or a torch optimizer steps. This is for
            discriminators that run twice per step, gradient accumulation and frozen models.
            docs/fuse.md lists the changes that this mode cannot see.
        bucket_cap_mb: the most MiB of v in one launch. With several launches, gradients of the last
            layers are there before the backward is done, and DistributedDataParallel sends them
            meanwhile. None means one launch for each device and autocast dtype.
        autocast: whether to write weights directly in the dtype of autocast, which saves the cast.
            The weights have the bits of the cast; gradients of a weight that is used twice are
            added in that dtype.

    Returns:
        The group. It need not be kept, because the model refers to all that it needs.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if there are no weight-normed layers, or ``reuse`` or ``bucket_cap_mb`` is
            wrong.
        RuntimeError: if a layer is in a group already.
    """
    _check(model, reuse, bucket_cap_mb, autocast)
    found = _weights(model)
    end_watches(weights for _, weights, _ in found if isinstance(weights, WeightNormList))
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


def _weights(model: nn.Module) -> list[tuple[str, NormedList, list[nn.Module]]]:
    """Every weight of this package in a model: its name, its parametrization list and the modules
    around it, innermost first.

    Raises:
        ValueError: if there is no such weight.
        RuntimeError: if a weight is in a group already.
    """
    candidates: dict[str, NormedList] = {}
    others = set()
    modules = dict(model.named_modules())
    for path, module in modules.items():
        for normed in normed_in(module, path).values():
            if normed.kind != OURS:
                others.add(normed.kind)
                continue
            why, weights = _why_not(normed), normed.weights
            if why or not isinstance(weights, WeightNormList):
                others.add(f"{normed.kind} {why or 'registered as a parametrization by hand'}")
                continue
            candidates[normed.path] = weights
        candidates |= {forced.path: forced.weights for forced in forced_in(module, path)}
    found = []
    for path, weights in candidates.items():
        if weights.owner is not None and weights.owner.is_group:
            raise RuntimeError(
                f"model: expected layers outside any group, got {path!r}, which is in one "
                "already; remove() that group first"
            )
        parts = path.split(".")[:-1]
        around = [modules[".".join(parts[:k])] for k in range(len(parts), 0, -1)]
        found.append((path, weights, [*around, model]))
    if not found:
        got = f"layers with {', '.join(sorted(others))} only" if others else "none"
        hint = (
            "" if others.isdisjoint((TORCH, TORCH_HOOK)) else "; call wnkernel.convert(model) first"
        )
        raise ValueError(f"model: expected layers with wnkernel.weight_norm, got {got}{hint}")
    return found


def _why_not(normed: NormedParameter) -> str | None:
    """Why a weight norm of this package cannot be in a group; None if it can."""
    if len(stacked_in(normed.weights)) > 1:
        return "under other parametrizations"
    if not normed.is_alone:
        return "on top of other parametrizations"
    return None


def _buckets(weights: list[NormedList], cap_mb: float | None) -> list[int]:
    """The bucket of every weight. Buckets are filled from the last weight to the first, because
    gradients come in that order."""
    bucket, filled = 0, 0
    buckets = []
    for entry in reversed(weights):
        v: Tensor = getattr(entry, V if isinstance(entry, WeightNormList) else "original")
        size = v.nbytes
        if cap_mb is not None and filled and filled + size > cap_mb * 2**20:
            bucket, filled = bucket + 1, 0
        filled += size
        buckets.append(bucket)
    return buckets[::-1]
