"""Checkpoints of any layout for models that keep torch's own weight norm."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn
from torch.nn.utils import parametrize

from ..census import (
    TORCH,
    TORCH_HOOK,
    NormedParameter,
    legacy_hooks,
    normed_in,
    parametrizations_of,
)
from ..problem import check_module
from .legacy import replace_loading, restore_loading
from .loading import WeightNormOriginals, register_load_hook, unregister_load_hook


class LayoutHandle:
    """A handle that undoes :func:`accept_any_layout`; it is a context manager too."""

    def __init__(self, undo: Mapping[str, Callable[[], None]]) -> None:
        self._undo = dict(undo)

    @property
    def weights(self) -> list[str]:
        """The weights that load from any layout because of this handle, as a folded model names
        them."""
        return list(self._undo)

    def remove(self) -> None:
        """Let torch load these weights as it did before."""
        while self._undo:
            self._undo.popitem()[1]()

    def __enter__(self) -> LayoutHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def accept_any_layout(model: nn.Module) -> LayoutHandle:
    """Let torch's own weight-normed layers load every key layout, as layers of this package do.

    ``model.load_state_dict`` then takes parametrized, legacy and plain keys, with the same checks,
    in layers of :func:`torch.nn.utils.weight_norm` (which otherwise take legacy keys only) and of
    :func:`torch.nn.utils.parametrizations.weight_norm`. Parameters, their names and
    ``model.state_dict()`` do not change. Layers of this package take all layouts anyway. Subclasses
    of torch's legacy hook refuse plain keys, because they may compute another weight. A deep copy
    of the model takes all layouts for good, because the handle does not know the copy.

    Args:
        model: any module; weight norms that it gets later are not covered.

    Returns:
        A handle with ``remove()`` and ``weights``, which is also a context manager. A weight that
        takes any layout already stays with its earlier handle.

    Raises:
        TypeError: if ``model`` is not a torch.nn.Module.
    """
    check_module("model", model)
    undo: dict[str, Callable[[], None]] = {}
    for path, module in model.named_modules():
        normed = normed_in(module, path).values()
        if replace_loading(module):
            hooks = [weight for weight in normed if weight.kind == TORCH_HOOK]
            undo |= {weight.path: _accept_legacy(module, weight.name) for weight in hooks}
        for weight in normed:
            if weight.kind == TORCH and _is_of_torch(weight):
                undo[weight.path] = _accept_parametrized(module, weight.name)
    return LayoutHandle(undo)


def _is_of_torch(weight: NormedParameter) -> bool:
    """Whether torch's own list loads the weight, and the weight norm comes first in this list."""
    return weight.is_first and type(weight.weights) is parametrize.ParametrizationList


def _accept_legacy(module: nn.Module, name: str) -> Callable[[], None]:
    stale = unregister_load_hook(module, name)  # an earlier parametrization left it

    def undo() -> None:
        restore_loading(module)
        if name in legacy_hooks(module):  # it was neither removed nor converted
            module._load_state_dict_pre_hooks.update(stale)

    return undo


def _accept_parametrized(module: nn.Module, name: str) -> Callable[[], None]:
    weights = parametrizations_of(module, name)
    weights.__class__ = WeightNormOriginals
    of_torch = register_load_hook(module, name)

    def undo() -> None:
        kind = type(weights)
        if kind is WeightNormOriginals:  # it was not converted
            weights.__class__ = parametrize.ParametrizationList
            unregister_load_hook(module, name)
            module._load_state_dict_pre_hooks.update(of_torch)

    return undo
