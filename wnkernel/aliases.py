"""``weight_g`` and ``weight_v`` on layers with parametrizations: what code for torch's legacy hook
reads and writes (``layer.weight_g.data.fill_(1)``, ``layer.weight_g.requires_grad = False``,
``prune.l1_unstructured(layer, "weight_v", 0.5)``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .census import parametrizations_of
from .keys import G, V, legacy_keys

PRUNED = "_orig"
"""What :mod:`torch.nn.utils.prune` appends to the name of a parameter that it takes over."""


class LegacyName(property):
    """An original of a weight norm, under its legacy name. The name is nobody's once the weight
    norm is gone, however that happened."""

    def __init__(self, key: str, name: str, original: str) -> None:
        # Functions: torch.compile of torch 2.6 reads no property of bound methods.
        super().__init__(
            lambda module: self._get(module),
            lambda module, value: self._set(module, value),
            lambda module: self._delete(module),
        )
        self.key = key
        self.name = name
        self.original = original

    def weights(self, module: nn.Module) -> parametrize.ParametrizationList | None:
        """The list that the original is in; None once the weight norm is gone."""
        if not parametrize.is_parametrized(module, self.name):
            return None
        return parametrizations_of(module, self.name)

    def _get(self, module: nn.Module) -> Tensor:
        weights = self.weights(module)
        if weights is None:
            raise AttributeError  # nn.Module.__getattr__ is asked next
        return getattr(weights, self.original)

    def _set(self, module: nn.Module, value: Any) -> None:
        weights = self.weights(module)
        if weights is None:
            raise AttributeError(f"{type(module).__name__} has no weight norm on {self.name!r}")
        try:
            setattr(weights, self.original, value)
        except TypeError as error:  # torch's, of what is no Parameter
            raise TypeError(str(error).replace(self.original, self.key)) from None

    def _delete(self, module: nn.Module) -> None:
        weights = self.weights(module)
        if weights is None:
            raise AttributeError(f"{type(module).__name__} has no {self.key!r}")
        # What pruning has put there, see below: prune.remove deletes it, then gives back g or v.
        if vars(weights).pop(self.original, None) is None:
            raise AttributeError(
                f"{self.name}: expected both g and v to go, or neither; "
                f"wnkernel.remove_weight_norm(layer, {self.name!r}) takes them away"
            )


def answer_to_legacy_names(module: nn.Module, name: str) -> None:
    """Let ``module.<name>_g`` and ``module.<name>_v`` be the originals of a weight norm.

    The module's class has to be its own.
    """
    for key, original in zip(legacy_keys(name), (G, V), strict=True):
        setattr(type(module), key, LegacyName(key, name, original))


def forget_legacy_names(module: nn.Module, name: str) -> None:
    """Undo :func:`answer_to_legacy_names`, if it was done and the module has a class of its own."""
    for key in legacy_keys(name):
        if isinstance(vars(type(module)).get(key), LegacyName):
            delattr(type(module), key)


def has_legacy_names(module: nn.Module, name: str) -> bool:
    """Whether a module answers to the legacy names of a weight norm."""
    return _alias(module, legacy_keys(name)[0]) is not None


def pruned_original(module: nn.Module, name: str) -> str | None:
    """The legacy name of g or v, if :mod:`torch.nn.utils.prune` computes it from a mask."""
    for key in legacy_keys(name):
        if key + PRUNED in module._parameters and key not in module._parameters:
            return key
    return None


def register_by_legacy_name(module: nn.Module, key: str, parameter: nn.Parameter | None) -> bool:
    """Do what ``module.register_parameter`` is asked for if that concerns a legacy name.

    Returns:
        Whether it is done. After False the module still has to register the parameter.
    """
    alias = _alias(module, key)
    if alias is not None and alias.weights(module) is not None:
        alias._set(module, parameter)
        return True
    pruned = _alias(module, key.removesuffix(PRUNED)) if key.endswith(PRUNED) else None
    if pruned is None or parameter is None:
        return False
    weights = pruned.weights(module)
    if weights is not None and weights._parameters.get(pruned.original) is parameter:
        # Pruning keeps the parameter under another name, deletes this entry of the module's own
        # parameters, and assigns a masked tensor to the legacy name before every forward.
        module._parameters[pruned.key] = weights._parameters.pop(pruned.original)
    return False


def _alias(module: nn.Module, key: str) -> LegacyName | None:
    found = getattr(type(module), key, None)
    return found if isinstance(found, LegacyName) else None
