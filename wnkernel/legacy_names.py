"""``weight_g`` and ``weight_v`` on layers with parametrizations: what code for torch's legacy hook
reads and writes (``layer.weight_g.data.fill_(1)``, ``layer.weight_g.requires_grad = False``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .checkpoint import legacy_keys
from .checkpoint.loading import G, V


class _LegacyName(property):
    """An original of a weight norm, under its legacy name. The name is nobody's once the weight
    norm is gone, however that happened."""

    def __init__(self, name: str, original: str) -> None:
        def get(module: nn.Module) -> Tensor:
            if not parametrize.is_parametrized(module, name):
                raise AttributeError  # nn.Module.__getattr__ is asked next
            return getattr(module.parametrizations[name], original)

        def delete(module: nn.Module) -> None:
            raise AttributeError(
                f"{name}: expected both g and v to go, or neither; "
                f"wnkernel.remove_weight_norm(layer, {name!r}) takes them away"
            )

        super().__init__(get, fdel=delete)
        self.name = name
        self.original = original


def answer_to_legacy_names(module: nn.Module, name: str) -> None:
    """Let ``module.<name>_g`` and ``module.<name>_v`` be the originals of a weight norm.

    The module's class has to be its own.
    """
    cls = type(module)
    for key, original in zip(legacy_keys(name), (G, V), strict=True):
        setattr(cls, key, _LegacyName(name, original))
    inherited = cls.__setattr__

    # nn.Module registers a Parameter without looking for a property.
    def set_attribute(self: nn.Module, key: str, value: Any) -> None:
        alias = getattr(type(self), key, None)
        if isinstance(alias, _LegacyName) and parametrize.is_parametrized(self, alias.name):
            try:
                setattr(self.parametrizations[alias.name], alias.original, value)
            except TypeError as error:  # torch's, of what is no Parameter
                raise TypeError(str(error).replace(alias.original, key)) from None
        else:
            inherited(self, key, value)

    cls.__setattr__ = set_attribute
