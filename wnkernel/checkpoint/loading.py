"""What runs when ``load_state_dict`` reaches a weight-normed layer.

torch loads a tree of modules from its root, each with the part of the dict below its prefix, and
others walk the tree with one dict for all, which may be the caller's. So nothing is renamed in it:
a hook on the layer, which sees the keys of all layouts, loads g and v into the list of
parametrizations below the layer; the list, when its turn comes, leaves them as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm as TorchWeightNorm

from .layouts import has_values, legacy_hooks, legacy_keys, split_for_torch
from .legacy import restore_loading
from .pairs import Source, Target, forget, load_weight, source

G, V = "original0", "original1"


@dataclass(frozen=True)
class _Visit:
    """What the hook of a layer did, for the list of parametrizations, which torch visits later."""

    error_msgs: list[str]
    """The list that a call of ``load_state_dict`` passes to all modules: it tells calls apart."""
    keys: list[str]


class WeightNormOriginals(parametrize.ParametrizationList):
    """A ``ParametrizationList`` of which g and v are loaded both or not at all."""

    _visit: _Visit | None = None

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        visit: _Visit | None = self.__dict__.pop("_visit", None)
        if visit and visit.error_msgs is error_msgs:
            forget(visit.keys, unexpected_keys)
            missing_keys = []
        else:  # loaded without the layer above
            where = Source(
                state_dict, prefix.removesuffix(".") or "weight", ((prefix + G, prefix + V),)
            )
            if where.keys() and self.has_parameters():
                _load(where, self, prefix, local_metadata, error_msgs)
                missing_keys = []
        if self.has_parameters():
            both = (prefix + G, prefix + V)
            state_dict = {key: t for key, t in state_dict.items() if key not in both}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def split(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The g and v of a weight, through all that is stacked on the weight norm."""
        for parametrization in reversed(self):
            if type(parametrization) is TorchWeightNorm:
                weight = split_for_torch(weight, parametrization.dim)
            else:
                weight = parametrization.right_inverse(weight)
        return weight

    @torch.no_grad()
    def right_inverse(self, value: Tensor) -> None:
        """Write the g and v of a weight that is assigned to the layer into the memory that they
        have: CUDA graphs, flat buffers and other processes may know it. (torch's gives them other
        memory; that is left for a weight of another shape.) A row of zeros, of which the norm and
        no direction is known (a layer fused with a batch norm that is 0 there), does not become
        NaN."""
        if not all(hasattr(parametrization, "right_inverse") for parametrization in self):
            super().right_inverse(value)  # says which has none
        g, v = self.split(value)
        if g.numel() != self.original0.numel() or v.shape != self.original1.shape:
            super().right_inverse(value)
            return
        if has_values(g) and (zero := g == 0).any():
            v = torch.where(zero, 1.0, v)
        self.original0.copy_(g)
        self.original1.copy_(v)

    def has_parameters(self) -> bool:
        """Whether g and v are there to be loaded; in the views of FSDP's first version they are
        not, and what to do is left to torch."""
        return all(name in self._parameters or name in self._buffers for name in (G, V))


class LoadHook:
    """Loads a layer's g and v from whichever layout its keys are in.

    It asks the module whether the weight norm is still there: ``parametrize`` can remove that
    without knowing of this hook, and a layer that is plain again must see the keys as they are.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(
        self,
        module: nn.Module,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if not parametrize.is_parametrized(module, self.name):
            return
        weights = module.parametrizations[self.name]
        if not isinstance(weights, WeightNormOriginals) or not weights.has_parameters():
            return
        own = module._parameters.keys() | module._buffers.keys()
        has_own = bool(own & set(legacy_keys(self.name)))
        where = source(state_dict, prefix, self.name, legacy=not has_own)
        if not (keys := where.keys()):
            return
        below = f"{prefix}parametrizations.{self.name}."
        _load(where, weights, below, local_metadata, error_msgs)
        weights._visit = _Visit(error_msgs, keys)


def _load(
    where: Source,
    weights: WeightNormOriginals,
    prefix: str,
    local_metadata: dict[str, Any],
    error_msgs: list[str],
) -> None:
    compose = weights[0].forward if len(weights) == 1 else None
    target = Target(weights.original0, weights.original1, weights.split, compose)
    load_weight(where, target, weights, (G, V), prefix, local_metadata, error_msgs)


def register_load_hook(module: nn.Module, name: str) -> dict[int, Any]:
    """Let ``module`` load checkpoints of all layouts into parameter ``name``.

    A hook that an earlier weight norm left behind (``remove_parametrizations`` does) is replaced.

    Returns:
        What was replaced, as :func:`unregister_load_hook` returns it.
    """
    replaced = unregister_load_hook(module, name)
    module._register_load_state_dict_pre_hook(LoadHook(name), with_module=True)
    return replaced


def unregister_load_hook(module: nn.Module, name: str) -> dict[int, Any]:
    """Remove the load hook for ``name``, ours or the one that torch's weight norm leaves behind.

    Returns:
        The removed entries of ``module._load_state_dict_pre_hooks``.
    """
    if not legacy_hooks(module):
        restore_loading(module)
    hooks = module._load_state_dict_pre_hooks
    return {
        key: hooks.pop(key) for key, wrapped in [*hooks.items()] if loads_for(wrapped.hook) == name
    }


def loads_for(hook: Callable[..., None]) -> str | None:
    """The parameter that a load hook belongs to, if it is ours or that of torch's weight norm."""
    if isinstance(hook, LoadHook):
        return hook.name
    if getattr(hook, "__name__", "") == "_weight_norm_compat_hook":
        return inspect.getclosurevars(hook).nonlocals.get("name")
    return None
