"""Guards against other libraries that write to the weight of a weight-normed layer.

The weight is computed from g and v whenever it is read. PEFT merges an adapter by a write to
``base_layer.weight.data``, which is silently lost with torch's weight norm. Tensor parallelism
replaces some parameters of a layer and then fails on the others. Both first look for an attribute
of the layer: PEFT for ``base_layer``, tensor parallelism for ``_distribute_module_applied``.
Weight-normed layers have neither, so their classes get a guard under each of these names. The guard
looks at its caller. If the caller is about to write to the weight, the guard raises an error that
says what to do. Reading a weight takes no longer than without guards.
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
"""Methods of PEFT's adapters that write to the weight of their layer or, with
``target_parameters``, expect a parameter instead of g and v. Methods of these names in other
libraries may assign the weight, which is right, so only those in modules of PEFT count."""

DEPTH = 3
"""The largest number of calls from such a method to ``get_base_layer``."""


class WriteGuard:
    """A descriptor for an attribute that weight-normed layers do not have. It looks at the code
    that reads the attribute.

    Args:
        name: the name of the attribute.
        writer: a function that takes the frame of this code, and returns the name of the method or
            class that is about to write to the weight, or None.
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
        raise AttributeError(self._name)  # Python calls nn.Module.__getattr__ next


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
"""The guards of weight-normed classes, by the names of the attributes."""
