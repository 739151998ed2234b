"""Writes to ``layer.weight`` that go nowhere, and the line to write instead.

``nn.init.normal_(layer.weight)`` on a weight-normed layer fills a tensor that was computed for this
read only. With torch's weight norm the layer keeps its old weight without a word
(https://github.com/pytorch/pytorch/issues/180968); published vocoders have been initialised like
that. Here it is noticed at the next read, as long as the layer is new: initialisation comes before
the first forward, and a layer that has run is not watched.
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
"""How many reads outside of a forward are watched: code that computes with ``layer.weight`` without
calling the layer is not to pay for the watch forever."""


class FirstReads:
    """What a new ``WeightNormList`` asks when it is read, until its layer has run.

    Args:
        weights: the list.
        place: which weight that is, for the warning.
    """

    is_group = False

    def __init__(self, weights: WeightNormList, place: str) -> None:
        self._weights = weakref.ref(weights)
        self._place = place
        self._reads = 0
        self._last: tuple[Tensor, Tensor] | None = None
        """``w`` of the last read, without its history, and the sum of its bits."""

    def read(self, v: Tensor, g: Tensor, dim: int, eps: float) -> Tensor:
        """``w``, with a warning if the one that was read before has been written to."""
        w = functional.weight_norm(v, g, dim, eps=eps)
        self._check()
        self._reads += 1
        if self._reads > READS or _is_in_forward(sys._getframe(1)):
            self.end()
        elif type(w) is Tensor and _has_values_now(w):
            # Not w itself: its history holds on to v and g, which others may want to swap.
            self._last = w.detach(), _sum_of_bits(w)
        return w

    def _check(self) -> None:
        """Warn if the weight that was read last has been written to, and forget it."""
        last, self._last = self._last, None  # at once: other threads may read too
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
        """Take what was read last for no lost write, whatever happens to it."""
        self._last = None

    def end(self) -> None:
        """Warn if there is a reason to, and watch no longer."""
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

    A watch that ends may warn, and warnings may be errors. The first of these is raised when all
    lost writes have been told, and everybody is watched as before.
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
    """Warn of no write to a weight that was read until now: another one is assigned."""
    if (watch := _watch_on(weights)) is not None:
        watch.forget()


def _watch_on(weights: nn.Module) -> FirstReads | None:
    owner = weights.owner if isinstance(weights, WeightNormList) else None
    return owner if isinstance(owner, FirstReads) else None


def _nothing() -> None:
    """What comes back of a watch from a pickle."""


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
    """Whether a tensor can be looked at: not while transforms run, or a CUDA graph is captured, and
    not without memory, which some devices do not show and others may have taken away."""
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
