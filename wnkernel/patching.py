"""``patch_torch()``: code that calls torch's weight norm builds layers of this package."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import remove_weight_norm as torchs_remove_legacy
from torch.nn.utils import weight_norm as torchs_legacy

from . import layers
from .aliases import answer_to_legacy_names
from .census import TORCH_HOOK, parametrizations_of, stacked_in, weight_norm_kind
from .checkpoint import unregister_load_hook
from .module_class import own_class, share_class

torchs = parametrizations.weight_norm
torchs_remove = parametrize.remove_parametrizations


def _legacy(module: nn.Module, name: str = "weight", dim: int | None = 0) -> nn.Module:
    """The replacement of :func:`torch.nn.utils.weight_norm`. The layer has ``weight_g`` and
    ``weight_v``."""
    layers.weight_norm(module, name, dim)
    own_class(module)
    answer_to_legacy_names(module, name)
    share_class(module)
    return module


def _weight_norm(module: nn.Module, name: str = "weight", dim: int | None = 0) -> nn.Module:
    """The replacement of :func:`torch.nn.utils.parametrizations.weight_norm`."""
    return layers.weight_norm(module, name, dim)


def _remove_legacy(module: nn.Module, name: str = "weight") -> nn.Module:
    """The replacement of :func:`torch.nn.utils.remove_weight_norm`, for all three kinds."""
    return layers.remove_weight_norm(module, name)


def _remove(
    module: nn.Module, tensor_name: str = "weight", leave_parametrized: bool = True
) -> nn.Module:
    """The replacement of :func:`torch.nn.utils.parametrize.remove_parametrizations`. It removes a
    weight norm without leftovers. ``tensor_name`` has a default, because packages call this instead
    of the legacy remover, which has one."""
    normed = isinstance(module, nn.Module) and weight_norm_kind(module, tensor_name)
    if not normed or normed == TORCH_HOOK or not leave_parametrized:
        return torchs_remove(module, tensor_name, leave_parametrized)
    if len(stacked_in(parametrizations_of(module, tensor_name))) == 1:
        return layers.remove_weight_norm(module, tensor_name)
    own_class(module)
    torchs_remove(module, tensor_name)
    unregister_load_hook(module, tensor_name)
    return module


class _Patch:
    """The one patch of this process, with the number of contexts that need it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._contexts = 0
        self._namespaces: list[dict[str, Any]] = []
        self._pairs: list[tuple[Callable[..., Any], Callable[..., Any]]] = [
            (torchs_legacy, _legacy),
            (torchs, _weight_norm),
            (torchs_remove_legacy, _remove_legacy),
            (torchs_remove, _remove),
        ]

    def enter(self) -> None:
        with self._lock:
            if self._contexts == 0:
                try:
                    self._install()
                except BaseException:
                    self._restore()
                    raise
            self._contexts += 1

    def leave(self) -> None:
        with self._lock:
            self._contexts -= 1
            if self._contexts == 0:
                self._restore()

    def _install(self) -> None:
        replacements = {id(of_torch): ours for of_torch, ours in self._pairs}
        for namespace in _namespaces():
            self._namespaces.append(namespace)
            _replace(namespace, replacements)

    def _restore(self) -> None:
        replacements = {id(ours): of_torch for of_torch, ours in self._pairs}
        while self._namespaces:  # some may have left sys.modules
            _replace(self._namespaces.pop(), replacements)
        for namespace in _namespaces():  # others are new
            _replace(namespace, replacements)


def _namespaces() -> Iterator[dict[str, Any]]:
    """The globals of all modules except those of this package, which need torch's own functions."""
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and name.partition(".")[0] != __package__:
            yield vars(module)


def _replace(namespace: dict[str, Any], replacements: dict[int, Callable[..., Any]]) -> None:
    for key, value in list(namespace.items()):
        if id(value) in replacements:
            namespace[key] = replacements[id(value)]


_patch = _Patch()


@contextmanager
def patch_torch() -> Iterator[None]:
    """Within the block, code that calls torch's weight norm builds layers of this package.

    ::

        with wnkernel.patch_torch():
            model = EncodecModel(config)  # calls torch.nn.utils.weight_norm somewhere

    Four functions are replaced: :func:`torch.nn.utils.weight_norm`,
    :func:`torch.nn.utils.parametrizations.weight_norm`, :func:`torch.nn.utils.remove_weight_norm`
    (which then removes any kind) and :func:`torch.nn.utils.parametrize.remove_parametrizations`
    (which changes only for weight norms). Layers built by the first function also have ``weight_g``
    and ``weight_v``; their checkpoint keys are those of this package.

    Every global of every imported module that is one of these functions is replaced, whatever its
    name, so a ``from torch.nn.utils import weight_norm`` at the top of a file is covered. Imports
    in the block get the replacements. References that are not module globals are **not replaced**:
    class attributes (``norm = staticmethod(weight_norm)``), local variables and closures, default
    arguments, ``functools.partial``, and entries of dicts and lists. Neither are the classes behind
    the functions, ``torch.nn.utils.weight_norm.WeightNorm`` and ``parametrizations._WeightNorm``.
    Use :func:`convert` for the layers that these build.

    The end of the block restores torch's functions in all modules, also after an exception. The
    patch holds for all threads of the process. Blocks may nest and overlap; the last one to end
    restores the functions.
    """
    _patch.enter()
    try:
        yield
    finally:
        _patch.leave()
