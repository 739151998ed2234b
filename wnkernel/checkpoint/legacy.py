"""Loading any layout into modules that keep torch's legacy weight norm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm as LegacyHook

from .. import functional
from ..census import is_known, legacy_hooks
from ..keys import legacy_keys
from ..splitting import split_for_torch
from .pairs import Place, Target, forget, load_weight, source

_LOAD, _BEFORE = "_load_from_state_dict", "_load_before_any_layout"
"""The method by which a module loads, and the attribute that keeps the module's own method while
:func:`replace_loading` has replaced it."""


def replace_loading(module: nn.Module) -> bool:
    """Replace the loading method of a module with legacy weight norms.

    A load hook is not enough: torch would go on to load half of a pair, and report keys of other
    layouts.

    Returns:
        Whether it was replaced; False if there are no legacy weight norms, or it is replaced
        already.
    """
    if _is_replaced(module) or not legacy_hooks(module):
        return False
    if _LOAD in vars(module):
        setattr(module, _BEFORE, module._load_from_state_dict)
    setattr(module, _LOAD, MethodType(_load_from_state_dict, module))
    return True


def restore_loading(module: nn.Module) -> None:
    """Undo :func:`replace_loading` if it was called."""
    if _is_replaced(module):
        delattr(module, _LOAD)
        if _BEFORE in vars(module):
            setattr(module, _LOAD, vars(module).pop(_BEFORE))


def _is_replaced(module: nn.Module) -> bool:
    method = vars(module).get(_LOAD)
    return getattr(method, "__func__", None) is _load_from_state_dict


# A copy of a module binds this function again. An unpickled module gets its class's method, which
# pickle finds by this name.
def _load_from_state_dict(
    self: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    used: list[str] = []
    current: dict[str, Tensor] = {}
    for name, (_, hook) in legacy_hooks(self).items():
        where, names = source(state_dict, prefix, name), legacy_keys(name)
        if keys := where.keys():
            target = _target(self, names, hook)
            places = partial(_places, self, names)
            load_weight(where, target, places, prefix, local_metadata, error_msgs)
            used += keys
            current |= {prefix + n: getattr(self, n) for n in names}
    errors = len(error_msgs)
    load = vars(self).get(_BEFORE) or partial(type(self)._load_from_state_dict, self)
    with _holding(state_dict, current):
        load(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
    forget(used, unexpected_keys)
    # A tensor that could not be swapped before gives the same error again, which is dropped.
    error_msgs[errors:] = [text for text in error_msgs[errors:] if text not in error_msgs[:errors]]


def _places(module: nn.Module, names: tuple[str, str], pair: tuple[Tensor, Tensor]) -> list[Place]:
    return [(module, name, t) for name, t in zip(names, pair, strict=True)]


def _target(module: nn.Module, names: tuple[str, str], hook: LegacyHook) -> Target:
    g, v = (getattr(module, name) for name in names)
    if not is_known(hook):
        return Target(g, v, partial(_refuse, hook), None)

    def compose(g: Tensor, v: Tensor) -> Tensor:
        return functional.weight_norm(v, g, hook.dim)

    return Target(g, v, partial(split_for_torch, dim=hook.dim), compose)


def _refuse(hook: LegacyHook, weight: Tensor) -> tuple[Tensor, Tensor]:
    raise TypeError(f"{type(hook).__name__} may compute another weight than torch's WeightNorm")


@contextmanager
def _holding(state_dict: dict[str, Any], entries: dict[str, Tensor]) -> Iterator[None]:
    """Put entries into a dict for the block, without changing its order."""
    before = {key: state_dict[key] for key in entries if key in state_dict}
    state_dict.update(entries)
    try:
        yield
    finally:
        for key in entries.keys() - before.keys():
            state_dict.pop(key, None)
        state_dict.update(before)
