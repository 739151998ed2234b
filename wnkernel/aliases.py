"""The attributes ``weight_g`` and ``weight_v`` of layers with parametrizations. Code for torch's
legacy hook reads and writes them (``layer.weight_g.data.fill_(1)``,
``layer.weight_g.requires_grad = False``, ``prune.l1_unstructured(layer, "weight_v", 0.5)``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .census import parametrizations_of
from .keys import G, V, legacy_keys

PRUNED = "_orig"
"""The suffix that :mod:`torch.nn.utils.prune` appends to the name of a parameter that it takes
over."""


class LegacyName(property):
    """A property that gives g or v of a weight norm under its legacy name. Once the weight norm is
    removed, by whatever code, the module has no attribute of this name."""

    def __init__(self, key: str, name: str, original: str) -> None:
        # These are lambdas, because torch.compile of torch 2.6 reads no property of bound methods.
        super().__init__(
            lambda module: self._get(module),
            lambda module, value: self._set(module, value),
            lambda module: self._delete(module),
        )
        self.key = key
        self.name = name
        self.original = original

    def weights(self, module: nn.Module) -> parametrize.ParametrizationList | None:
        """The list of parametrizations that holds g or v; None once the weight norm is removed."""
        if not parametrize.is_parametrized(module, self.name):
            return None
        return parametrizations_of(module, self.name)

    def _get(self, module: nn.Module) -> Tensor:
        weights = self.weights(module)
        if weights is None:
            raise AttributeError  # Python calls nn.Module.__getattr__ next
        return getattr(weights, self.original)

    def _set(self, module: nn.Module, value: Any) -> None:
        weights = self.weights(module)
        if weights is None:
            raise AttributeError(f"{type(module).__name__} has no weight norm on {self.name!r}")
        try:
            setattr(weights, self.original, value)
        except TypeError as error:  # torch raises it for what is no Parameter
            raise TypeError(str(error).replace(self.original, self.key)) from None

    def _delete(self, module: nn.Module) -> None:
        weights = self.weights(module)
        if weights is None:
            raise AttributeError(f"{type(module).__name__} has no {self.key!r}")
        # prune.remove deletes the masked tensor that pruning set, then registers g or v again.
        if vars(weights).pop(self.original, None) is None:
            raise AttributeError(
                f"{self.name}: expected both g and v to go, or neither; "
                f"wnkernel.remove_weight_norm(layer, {self.name!r}) takes them away"
            )


def answer_to_legacy_names(module: nn.Module, name: str) -> None:
    """Let ``module.<name>_g`` and ``module.<name>_v`` be g and v of a weight norm.

    No other module may share the class of this module.
    """
    for key, original in zip(legacy_keys(name), (G, V), strict=True):
        setattr(type(module), key, LegacyName(key, name, original))


def forget_legacy_names(module: nn.Module, name: str) -> None:
    """Undo :func:`answer_to_legacy_names` if it was called and the module has a class of its
    own."""
    for key in legacy_keys(name):
        if isinstance(vars(type(module)).get(key), LegacyName):
            delattr(type(module), key)


def has_legacy_names(module: nn.Module, name: str) -> bool:
    """Whether a module has the legacy names of a weight norm as attributes."""
    return _alias(module, legacy_keys(name)[0]) is not None


def pruned_original(module: nn.Module, name: str) -> str | None:
    """The legacy name of the g or v that :mod:`torch.nn.utils.prune` computes from a mask, or
    None."""
    for key in legacy_keys(name):
        if key + PRUNED in module._parameters and key not in module._parameters:
            return key
    return None


def register_by_legacy_name(module: nn.Module, key: str, parameter: nn.Parameter | None) -> bool:
    """Handle ``module.register_parameter(key, parameter)`` if ``key`` is a legacy name.

    Returns:
        Whether the parameter has been registered. If not, the module still has to register it.
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
        # Pruning registers the parameter under another name, deletes the legacy name from the
        # module's parameters, and assigns a masked tensor to that name before every forward.
        module._parameters[pruned.key] = weights._parameters.pop(pruned.original)
    return False


def _alias(module: nn.Module, key: str) -> LegacyName | None:
    found = getattr(type(module), key, None)
    return found if isinstance(found, LegacyName) else None
