"""``forced_weight_norm(layer)``, and its keys in state dicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.utils import parametrize

from .census import (
    check_parameter,
    own_parametrizations,
    parametrizations_of,
    weight_norm_kind,
)
from .forcing import ForcedWeightNorm, Terms
from .module_class import own_class
from .parametrization import classes_are_as_made, module_is_untouched
from .problem import check_module

M = TypeVar("M", bound=nn.Module)


@torch.inference_mode(False)
def forced_weight_norm(
    module: M,
    name: str = "weight",
    dim: int | None = 0,
    *,
    gain: float = 1.0,
    eps: float = 1e-4,
) -> M:
    """Give a layer the weight norm of EDM2's magnitude-preserving layers
    (:class:`wnkernel.ForcedWeightNorm`).

    The parameter stays what it is, with its name in state dicts: checkpoints of EDM2, MMAudio and
    other code that keeps v as ``weight`` load, and are saved the same. ``layer.weight`` becomes w.
    In ``parameters()`` it comes after the other parameters of the layer, such as a bias; optimizer
    states of a model of plain layers go by that order.

    Args:
        module: the layer, changed in place.
        name: the name of the parameter.
        dim: the dimension along which each index has a norm; 0 is the output channels of a
            convolution or linear layer, as in EDM2.
        gain: a finite number that multiplies w.
        eps: added to the root mean square of rows; 1e-4 as in EDM2's code.

    Returns:
        ``module``.

    Raises:
        TypeError: if ``module`` is not a torch.nn.Module, or the parameter is not a dense
            floating-point tensor.
        ValueError: if there is no such parameter, if it is uninitialised, or if ``dim``, ``gain``
            or ``eps`` is wrong.
        RuntimeError: if the parameter has a parametrization or a weight norm already.
    """
    check_module("module", module)
    if parametrize.is_parametrized(module, name) or weight_norm_kind(module, name):
        raise RuntimeError(
            f"name: expected a plain parameter, got {name!r}, which has a parametrization or a "
            "weight norm already"
        )
    check_parameter(module, name, dim)
    norm = ForcedWeightNorm(dim, gain, eps=eps)
    norm.train(module.training)
    parametrize.register_parametrization(module, name, norm, unsafe=True)
    weights: Any = parametrizations_of(module, name)
    weights.__class__ = ForcedWeightNormList
    cls: Any = type(module)
    cls.__deepcopy__ = _deepcopy_by(cls.__deepcopy__)
    # Old versions of torch have these methods under private names only.
    module._register_state_dict_hook(partial(_rename_saved, name))
    module._register_load_state_dict_pre_hook(partial(_rename_loaded, name), with_module=True)
    return module


def _deepcopy_by(deepcopy: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Give copies classes of their own: torch would take the property of the weight from all copies
    when it is removed from one."""

    def copied(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        new = deepcopy(self, memo)
        own_class(new)
        return new

    return copied


class ForcedOwner(Protocol):
    """An object that computes the weight for a list: a member of a group."""

    is_group: bool

    def read_forced(self, terms: Terms) -> Tensor:
        """Return ``w``, equal to what :func:`wnkernel.forcing.forced_weights` would compute."""


class ForcedWeightNormList(parametrize.ParametrizationList):
    """torch's ``ParametrizationList``, which asks its owner if it holds one forced weight norm and
    nothing else is to happen."""

    owner: ForcedOwner | None = None
    """The object that computes the weight. If this is None, the list computes it. Compiled graphs
    never call the owner."""

    bucket: int | None = None
    casts: bool = False
    """Both are for groups, as in a list of a usual weight norm. Compiled graphs ignore them."""

    def __call__(self) -> Tensor:
        owner = self.owner
        if owner is None or is_dynamo_compiling() or not self.is_untouched():
            return super().__call__()
        return owner.read_forced(self.terms()) if classes_are_as_made() else super().__call__()

    def right_inverse(self, value: Tensor) -> None:
        """Set v to a copy of ``value``.

        Raises:
            ValueError: if ``value`` has another shape.
        """
        v: Any = self._parameters["original"]
        shape = v.shape
        if value.shape != shape:
            raise ValueError(
                f"weight: expected a tensor of shape {list(shape)}, got {list(value.shape)}"
            )
        super().right_inverse(value.clone())

    def terms(self) -> Terms:
        """What kernels are given for this weight now."""
        norm: Any = self._modules["0"]
        v: Any = self._parameters["original"]
        return norm.terms(v)

    def is_untouched(self) -> bool:
        """Whether a call of the list computes one forced weight norm and does nothing else, if
        :func:`classes_are_as_made`."""
        norm = self._modules.get("0")
        return (
            type(norm) is ForcedWeightNorm
            and len(self._modules) == 1
            and self._parameters.get("original") is not None
            and module_is_untouched(self)
            and module_is_untouched(norm)
        )


@dataclass(frozen=True)
class ForcedParameter:
    """A parameter of a model with a forced weight norm."""

    path: str
    """The name of the parameter in the model, such as ``decoder.conv.weight``."""
    module: nn.Module
    name: str
    """The name of the parameter in its module."""
    weights: ForcedWeightNormList
    kind: str = "wnkernel.forced_weight_norm"

    def fold(self) -> None:
        """Make w of eval mode the plain parameter, which stays the same Parameter object."""
        self.weights.owner = None
        self.weights.eval()
        own_class(self.module)
        parametrize.remove_parametrizations(self.module, self.name)


def forced_in(module: nn.Module, path: str = "") -> list[ForcedParameter]:
    """The forced weight norms of a module itself, without its children. ``path`` is the name of the
    module in the model."""
    prefix = f"{path}." if path else ""
    return [
        ForcedParameter(prefix + name, module, name, weights)
        for name, weights in own_parametrizations(module).items()
        if isinstance(weights, ForcedWeightNormList)
    ]


def _rename_saved(
    name: str, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: object
) -> None:
    """Give v the key of a plain parameter. A hook of ``state_dict``."""
    if (key := prefix + _own_key(name)) in state_dict:
        state_dict[prefix + name] = state_dict.pop(key)


def _rename_loaded(
    name: str, module: nn.Module, state_dict: dict[str, Any], prefix: str, *others: object
) -> None:
    """Give the plain key the name that v has in the module. A hook of ``load_state_dict``."""
    key = prefix + name
    if key in state_dict and parametrize.is_parametrized(module, name):
        state_dict[prefix + _own_key(name)] = state_dict.pop(key)


def _own_key(name: str) -> str:
    return f"parametrizations.{name}.original"
