"""The key layouts of weight-normed checkpoints.

======================  =====================================  ==========================
layout                  g                                      v
======================  =====================================  ==========================
parametrized (new)      ``parametrizations.<name>.original0``  ``....<name>.original1``
legacy                  ``<name>_g``                           ``<name>_v``
======================  =====================================  ==========================
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize


def parametrized_keys(name: str) -> tuple[str, str]:
    """Keys of g and v, below the layer's prefix, in the parametrized layout."""
    return f"parametrizations.{name}.original0", f"parametrizations.{name}.original1"


def legacy_keys(name: str) -> tuple[str, str]:
    """Keys of g and v, below the layer's prefix, in the legacy layout."""
    return f"{name}_g", f"{name}_v"


class LegacyLoadHook:
    """Renames a layer's legacy keys while ``load_state_dict`` runs.

    It asks the module whether the weight norm is still there: ``parametrize`` can remove that
    without knowing of this hook, and a layer that is plain again must see the keys as they are.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(
        self, module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any
    ) -> None:
        if not parametrize.is_parametrized(module, self.name):
            return
        legacy = [prefix + key for key in legacy_keys(self.name)]
        if all(key in state_dict for key in legacy):
            for old, new in zip(legacy, parametrized_keys(self.name), strict=True):
                state_dict[prefix + new] = state_dict.pop(old)


def register_load_hook(module: nn.Module, name: str) -> None:
    """Let ``module`` load checkpoints that hold ``<name>_g`` and ``<name>_v``.

    A hook that an earlier weight norm left behind (``remove_parametrizations`` does) is replaced.
    """
    unregister_load_hook(module, name)
    module._register_load_state_dict_pre_hook(LegacyLoadHook(name), with_module=True)


def unregister_load_hook(module: nn.Module, name: str) -> None:
    """Remove the load hook for ``name``, ours or the one that torch's weight norm leaves behind."""
    hooks = module._load_state_dict_pre_hooks
    for key in [k for k, wrapped in hooks.items() if _belongs_to(wrapped.hook, name)]:
        del hooks[key]


def _belongs_to(hook: Callable[..., None], name: str) -> bool:
    if isinstance(hook, LegacyLoadHook):
        return hook.name == name
    return (
        getattr(hook, "__name__", "") == "_weight_norm_compat_hook"
        and inspect.getclosurevars(hook).nonlocals.get("name") == name
    )
