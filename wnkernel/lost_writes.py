"""Writes to ``layer.weight`` that are lost, and the warning that says what to write instead.

``nn.init.normal_(layer.weight)`` on a weight-normed layer fills a tensor that was computed for this
read only. With torch's weight norm the layer silently keeps its old weight
(https://github.com/pytorch/pytorch/issues/180968), and published vocoders have been initialised
like that. This package warns at the next read of the weight if the layer is new. Initialisation
comes before the first forward, so a layer that has run is not watched.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .observers import are_calls_watched, is_followed
from .parametrization import WeightNormList
from .streams import is_capturing

READS = 4
"""How many reads outside of a forward are watched. Code that computes with ``layer.weight`` and
never calls the layer pays for no more than these."""


class FirstReads:
    """The owner of a new ``WeightNormList``, which watches the reads of the weight until the layer
    has run.

    Args:
        weights: the list.
        place: the description of the weight in the warning.
    """

    is_group = False

    def __init__(self, weights: WeightNormList, place: str) -> None:
        self._weights = weakref.ref(weights)
        self._place = place
        self._reads = 0
        self._last: tuple[Tensor, Tensor] | None = None
        """The ``w`` of the last read, detached, and the sum of its bits."""

    def read(self, v: Tensor, g: Tensor, dim: int, eps: float) -> Tensor:
        """Compute ``w``, and warn if the ``w`` of the previous read has been written to."""
        w = functional.weight_norm(v, g, dim, eps=eps)
        self._check()
        self._reads += 1
        if self._reads > READS or _is_in_forward(sys._getframe(1)):
            self.end()
        elif type(w) is Tensor and _has_values_now(w):
            # w itself would keep v and g alive, which others may want to swap.
            self._last = w.detach(), _sum_of_bits(w)
        return w

    def _check(self) -> None:
        """Warn if the ``w`` of the last read has been written to, and forget this tensor."""
        last, self._last = self._last, None  # in one step, as other threads may read too
        if last is None:
            return
        w, before = last
        if _has_values_now(w) and not torch.equal(_sum_of_bits(w), before):
            warnings.warn(
                f"A write to the weight of a weight-normed layer was lost ({self._place}): "
                "layer.weight is computed from g and v whenever it is read. Write "
                "wnkernel.init_weight_(layer, nn.init.normal_) for nn.init.normal_(layer.weight), "
                "and layer.weight = w for layer.weight.copy_(w).",
                stacklevel=1,
            )

    def forget(self) -> None:
        """Forget the ``w`` of the last read, so that no write to it causes a warning."""
        self._last = None

    def end(self) -> None:
        """Warn if a write was lost, and stop watching."""
        self._check()
        weights = self._weights()
        if weights is not None and weights.owner is self:
            weights.owner = None

    def __deepcopy__(self, memo: dict[int, Any]) -> FirstReads | None:
        weights = memo.get(id(self._weights()))
        return None if weights is None else FirstReads(weights, self._place)

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


def stop_watching(weights: nn.Module) -> None:
    """End the watch on a list of parametrizations, if there is one."""
    if (watch := _watch_on(weights)) is not None:
        watch.end()


def end_watches(lists: Iterable[WeightNormList]) -> None:
    """End the watches on lists of parametrizations, all or none of them.

    A watch may warn when it ends, and the warning may be an error. The first such error is raised
    after all lost writes have been reported, and then all watches go on.
    """
    watched = [(weights, owner) for weights in lists if (owner := weights.owner) is not None]
    error: Warning | None = None
    for _, owner in watched:
        if isinstance(owner, FirstReads):
            try:
                owner.end()
            except Warning as warning:
                error = error or warning
    if error is not None:
        for weights, owner in watched:
            weights.owner = owner
        raise error


def forget_writes(weights: nn.Module) -> None:
    """Forget the ``w`` of the last read, because a new weight is being assigned."""
    if (watch := _watch_on(weights)) is not None:
        watch.forget()


def _watch_on(weights: nn.Module) -> FirstReads | None:
    owner = weights.owner if isinstance(weights, WeightNormList) else None
    return owner if isinstance(owner, FirstReads) else None


def _nothing() -> None:
    """Unpickle a watch as None."""


def _is_in_forward(frame: FrameType | None, depth: int = 6) -> bool:
    """Whether one of the innermost calls is the forward of a module, or a part of one such as
    ``_conv_forward``."""
    while frame is not None and depth > 0:
        is_forward = frame.f_code.co_name.endswith("forward")
        if is_forward and isinstance(frame.f_locals.get("self"), nn.Module):
            return True
        frame, depth = frame.f_back, depth - 1
    return False


def _has_values_now(w: Tensor) -> bool:
    """Whether the values of a tensor can be read now. They cannot while transforms run or a CUDA
    graph is captured, nor if the tensor has no memory: some devices show none, and others may have
    freed it."""
    return (
        not w.is_meta
        and not (is_followed() or are_calls_watched())
        and not is_capturing(w.device)
        and torch._C._has_storage(w)
        and w.untyped_storage().nbytes() >= w.nbytes
    )


@torch.no_grad()
def _sum_of_bits(w: Tensor) -> Tensor:
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[w.element_size()]
    return w.detach().view(bits).sum(dtype=torch.int64)
