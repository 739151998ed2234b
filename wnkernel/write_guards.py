"""Guards against writes to the weight of a weight-normed layer that other libraries make.

The weight is computed from g and v whenever it is read. Adapters that are merged into it (PEFT)
write to ``base_layer.weight.data``: with torch's weight norm the write is lost without a word.
Tensor parallelism replaces some parameters of a layer and then fails on the others. Both first look
for an attribute of the layer: PEFT for ``base_layer``, tensor parallelism for
``_distribute_module_applied``. Weight-normed layers have neither; their classes get a guard under
each of these names. It looks at who asks, and where the weight is about to be written raises an
error that says what to do. Nothing is added to reading a weight.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from torch import nn
from torch.compiler import is_dynamo_compiling

WRITERS = frozenset(
    (
        "merge",
        "unmerge",
        "get_param",
        "set_base_weight",
        "corda_init",
        "loftq_init",
        "lora_ga_init",
        "olora_init",
        "pissa_init",
        "_truncate_base_weight",
    )
)
"""Methods of PEFT's adapters that write to the weight beneath them, or, with ``target_parameters``,
expect a parameter where g and v are. Others may have methods of these names that assign the weight,
which is right: PEFT's are told by the name of their module."""

DEPTH = 3
"""Calls from such a method to ``get_base_layer``, at most."""


class WriteGuard:
    """Stands for an attribute that weight-normed layers do not have, and looks at who asks for it.

    Args:
        name: what it is called.
        writer: who is about to write to the weight, given the frame that asks for it; None where
            it is just a question.
    """

    def __init__(self, name: str, writer: Callable[[FrameType], str | None]) -> None:
        self._name = name
        self._writer = writer

    def __get__(self, module: nn.Module | None, cls: type[nn.Module]) -> NoReturn:
        is_asked = module is not None and not is_dynamo_compiling()
        if is_asked and (writer := self._writer(sys._getframe(1))):
            raise RuntimeError(
                f"{writer}: expected a layer with a plain weight, got a {cls.__name__} with weight "
                "norm, whose weight is computed from g and v, so that what is written to it would "
                "be lost: call wnkernel.fold(model) before"
            )
        raise AttributeError(self._name)  # nn.Module.__getattr__ is asked next


def _merging(frame: FrameType) -> str | None:
    if frame.f_code.co_name != "get_base_layer":
        return None
    caller = frame.f_back
    for _ in range(DEPTH):
        if caller is None or "peft" not in _module(caller).split("."):
            return None
        if caller.f_code.co_name in WRITERS:
            return caller.f_code.co_name
        caller = caller.f_back
    return None


def _parallelizing(frame: FrameType) -> str | None:
    style = frame.f_back
    if frame.f_code.co_name != "distribute_module" or style is None:
        return None
    if _module(style) != "torch.distributed.tensor.parallel.style":
        return None
    return type(style.f_locals.get("self")).__name__


def _module(frame: FrameType) -> str:
    return frame.f_globals.get("__name__", "")


WRITE_GUARDS = {
    "base_layer": WriteGuard("base_layer", _merging),
    "_distribute_module_applied": WriteGuard("_distribute_module_applied", _parallelizing),
}
"""By name, for the classes of weight-normed modules."""
