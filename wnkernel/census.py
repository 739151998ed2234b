"""The census: which weights of a model are normed, by which kind of weight norm, and how exactly.

=====================================================  ==========================================
kind                                                   what computes the weight
=====================================================  ==========================================
``OURS``, of :func:`wnkernel.weight_norm`              a parametrization of this package
``TORCH``, of ``torch.nn.utils.parametrizations``      a parametrization of torch
``TORCH_HOOK``, of ``torch.nn.utils.weight_norm``      a hook that runs before each forward (legacy)
=====================================================  ==========================================

A subclass of one of the three counts as its kind, but may compute another weight. A weight is exact
if it is known to be ``g * v / norm(v)`` and to depend on nothing but its g and v.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm as TorchWeightNorm
from torch.nn.utils.weight_norm import WeightNorm as LegacyHook

from .keys import G, V, legacy_keys
from .norm_module import WeightNorm
from .problem import check_v
from .removal import RemovalHook

OURS = "wnkernel.weight_norm"
TORCH = "torch.nn.utils.parametrizations.weight_norm"
TORCH_HOOK = "torch.nn.utils.weight_norm"

Norm = WeightNorm | TorchWeightNorm | LegacyHook
"""The object that computes a weight: a parametrization or torch's legacy hook."""


@dataclass(frozen=True)
class NormedParameter:
    """A weight-normed parameter of a model."""

    path: str
    """The name of the parameter in the model, such as ``decoder.conv.weight``."""
    module: nn.Module
    name: str
    """The name of the parameter in its module."""
    kind: str
    """``OURS``, ``TORCH`` or ``TORCH_HOOK``."""
    norm: Norm
    """The parametrization or the hook that computes the weight."""

    @property
    def weights(self) -> parametrize.ParametrizationList:
        """The list of parametrizations of the parameter. A parameter with a legacy hook has no
        list."""
        return parametrizations_of(self.module, self.name)

    @property
    def is_first(self) -> bool:
        """Whether the weight norm is computed before all other parametrizations of the list."""
        return self.kind == TORCH_HOOK or stacked_in(self.weights)[0] is self.norm

    @property
    def is_alone(self) -> bool:
        """Whether the weight norm is the only computation between g and v and the weight."""
        return self.kind == TORCH_HOOK or is_alone(self.weights)

    @property
    def is_exact(self) -> bool:
        """Whether the weight is known to be ``g * v / max(norm(v), eps)`` of its g and v."""
        return is_known(self.norm) and self.is_alone

    @property
    def eps(self) -> float:
        """The lower bound of the norms; 0 for torch's kinds, which have no such bound."""
        return getattr(self.norm, "eps", 0.0)

    def originals(self) -> tuple[Tensor, Tensor]:
        """The tensors ``(g, v)``."""
        if self.kind == TORCH_HOOK:
            g, v = (getattr(self.module, key) for key in legacy_keys(self.name))
            return g, v
        return originals(self.weights)

    def source(self) -> Hashable:
        """A key that is equal for two weights that are computed alike from the same g and v."""
        if not self.is_exact:
            return id(self.module), self.name
        g, v = self.originals()
        return id(g), id(v), self.kind, self.norm.dim, self.eps


def census(model: nn.Module, *, shared: bool = False) -> list[NormedParameter]:
    """Every weight-normed parameter of a model, in the order of ``named_modules``.

    Args:
        model: any module; it is searched with all modules inside it.
        shared: whether a module that the model has under several names counts under each of them.
    """
    return [
        normed
        for path, module in model.named_modules(remove_duplicate=not shared)
        for normed in normed_in(module, path).values()
    ]


def normed_in(module: nn.Module, path: str = "") -> dict[str, NormedParameter]:
    """The weight-normed parameters of a module itself, without its children, by their names.

    Args:
        module: any module.
        path: the name of ``module`` in the model.
    """
    prefix = f"{path}." if path else ""
    found: dict[str, NormedParameter] = {}

    def add(name: str, kind: str, norm: Norm) -> None:
        found[name] = NormedParameter(prefix + name, module, name, kind, norm)

    for name, (_, hook) in legacy_hooks(module).items():
        add(name, TORCH_HOOK, hook)
    for name, weights in own_parametrizations(module).items():
        for norm in stacked_in(weights):
            if isinstance(norm, (WeightNorm, TorchWeightNorm)):
                add(name, OURS if isinstance(norm, WeightNorm) else TORCH, norm)
                break
    return found


def weight_norm_kind(module: nn.Module, name: str) -> str | None:
    """Which weight norm ``module.<name>`` has: OURS, TORCH, TORCH_HOOK or None."""
    normed = normed_in(module).get(name)
    return None if normed is None else normed.kind


def check_parameter(module: nn.Module, name: str, dim: int | None) -> None:
    """Check a plain parameter that is about to get a weight norm.

    Raises:
        TypeError: if it is not a dense floating-point tensor.
        ValueError: if there is no such parameter, if it is uninitialised, or if ``dim`` is wrong.
    """
    if module._parameters.get(name) is None:
        known = ", ".join(module._parameters) or "none"
        raise ValueError(
            f"name: expected a parameter of {type(module).__name__} (it has: {known}), got {name!r}"
            f"{_layers_instead(module, name)}"
        )
    weight = getattr(module, name)
    if is_lazy(weight):  # before torch 2.5 or so isinstance() is true of any subclass of Tensor
        raise ValueError(
            f"name: expected an initialised parameter, got {name!r}; run it once before applying "
            "weight norm (a normed module can't have uninitialized parameters)"
        )
    check_v(weight, dim)


def _layers_instead(module: nn.Module, name: str) -> str:
    """The part of an error message that names a layer inside ``module`` that has the parameter."""
    for path, layer in module.named_modules():
        if layer._parameters.get(name) is not None:
            return f"; apply it to the layers, for example to {path!r} ({type(layer).__name__})"
    return ""


def is_known(norm: nn.Module | LegacyHook) -> bool:
    """Whether a weight norm computes ``g * v / norm(v)``. Subclasses may compute something else."""
    return type(norm) in (WeightNorm, TorchWeightNorm, LegacyHook)


def is_alone(weights: parametrize.ParametrizationList) -> bool:
    """Whether a list has one parametrization, whose g and v are not parametrized themselves."""
    return len(stacked_in(weights)) == 1 and not own_parametrizations(weights)


def originals(weights: parametrize.ParametrizationList) -> tuple[Tensor, Tensor]:
    """The tensors ``(g, v)`` of a list of parametrizations."""
    return getattr(weights, G), getattr(weights, V)


def legacy_hooks(module: nn.Module) -> dict[str, tuple[int, LegacyHook]]:
    """The legacy hooks of a module, by the names of their parameters: for each name the key in
    ``_forward_pre_hooks``, and the hook."""
    return {
        hook.name: (key, hook)
        for key, hook in module._forward_pre_hooks.items()
        if isinstance(hook, LegacyHook) and type(hook) is not RemovalHook
    }


def parametrizations_of(module: nn.Module, name: str) -> parametrize.ParametrizationList:
    """``module.parametrizations[name]`` with its type, which type checkers cannot infer."""
    lists: Any = module.parametrizations
    return lists[name]


def own_parametrizations(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """The lists of parametrizations of a module itself, by the names of the parameters. This does
    not read the attribute ``parametrizations``, because wrappers (of ``torch.compile``, PEFT and
    FSDP) pass that on to the module that they wrap."""
    lists = module._modules.get("parametrizations")
    if not isinstance(lists, nn.ModuleDict):
        return {}
    found: dict[str, Any] = lists._modules
    return dict(found)


def stacked_in(weights: parametrize.ParametrizationList) -> list[nn.Module]:
    """The parametrizations of a list, in the order in which they are computed. ``len`` and ``iter``
    of the list also count ``weights.parametrizations``, which exists if g or v is parametrized
    itself."""
    return [module for key, module in weights._modules.items() if key.isdigit()]
