"""The three kinds of weight norm that a layer can carry, through public functions only."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import wnkernel

from .results import LEGACY, OURS, TORCH

NAME = "weight"
"""The parameter that every model here norms."""


def _apply_legacy(module: nn.Module, name: str, dim: int) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and still what many models use
        return torch.nn.utils.weight_norm(module, name, dim)


APPLY: dict[str, Callable[[nn.Module, str, int], nn.Module]] = {
    OURS: wnkernel.weight_norm,
    TORCH: torch.nn.utils.parametrizations.weight_norm,
    LEGACY: _apply_legacy,
}
"""How each kind is put on a layer."""


@dataclass(frozen=True)
class NormedLayer:
    """A weight-normed layer: its two parameters, and a function that computes its weight anew."""

    module: nn.Module
    v: nn.Parameter
    g: nn.Parameter
    dim: int | None
    weight: Callable[[], Tensor]


def apply(kind: str, module: nn.Module, dim: int | None) -> NormedLayer:
    """Put weight norm of ``kind`` on the weight of a plain layer."""
    torch_dim = -1 if dim is None else dim
    APPLY[kind](module, NAME, torch_dim)
    if kind == LEGACY:
        (hook,) = (h for h in module._forward_pre_hooks.values() if getattr(h, "name", "") == NAME)
        v, g = getattr(module, f"{NAME}_v"), getattr(module, f"{NAME}_g")

        def weight() -> Tensor:
            hook(module, None)
            return module.weight
    else:
        originals = module.parametrizations[NAME]
        v, g = originals.original1, originals.original0

        def weight() -> Tensor:
            return module.weight

    return NormedLayer(module, v, g, dim, weight)


@dataclass(frozen=True)
class Stripped:
    """A model without its weight norms, and what it takes to put any kind back.

    Models are copied in this form only: a copy of a parametrized layer shares its class with the
    original, and torch's ``remove_parametrizations`` on either takes the property from both.
    """

    model: nn.Module
    saved: dict[str, tuple[int | None, Tensor, Tensor]]
    """dim, v and g by the name of the layer."""

    def with_kind(self, kind: str) -> tuple[nn.Module, list[NormedLayer]]:
        """A copy with weight norm of ``kind`` on the same layers, with the same v and g."""
        model = copy.deepcopy(self.model)
        layers = []
        for name, (dim, v, g) in self.saved.items():
            layer = apply(kind, model.get_submodule(name), dim)
            with torch.no_grad():
                layer.v.copy_(v)
                layer.g.copy_(g)
            layers.append(layer)
        return model, layers

    def grads(self) -> list[Tensor]:
        """A random gradient for the weight of every layer."""
        random = torch.Generator().manual_seed(2)
        return [
            torch.randn(v.shape, generator=random).to(v.device) for _, v, _ in self.saved.values()
        ]


def strip(model: nn.Module) -> Stripped:
    """Take torch's weight norms off ``model``, in place."""
    saved = {}
    for name, module in list(model.named_modules()):
        if not _is_normed(module):
            continue
        originals = module.parametrizations[NAME]
        dim = originals[0].dim
        v, g = originals.original1.detach(), originals.original0.detach()
        saved[name] = (None if dim == -1 else dim), v, g
        parametrize.remove_parametrizations(module, NAME)
    return Stripped(model, saved)


def _is_normed(module: nn.Module) -> bool:
    return (
        parametrize.is_parametrized(module, NAME)
        and type(module.parametrizations[NAME][0]).__name__ == "_WeightNorm"
    )
