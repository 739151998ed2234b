"""What runs when ``load_state_dict`` reaches a weight-normed layer.

torch loads a tree of modules from its root, each with the part of the dict below its prefix, and
others walk the tree with one dict for all, which may be the caller's. So nothing is renamed in it:
a hook on the layer, which sees the keys of all layouts, loads g and v into the list of
parametrizations below the layer; the list, when its turn comes, leaves them as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm as TorchWeightNorm

from .layouts import (
    legacy_hooks,
    legacy_keys,
    own_parametrizations,
    split_for_torch,
    stacked_in,
)
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
        takes_both = self.takes_both(state_dict, prefix)
        if visit and visit.error_msgs is error_msgs:
            forget(visit.keys, unexpected_keys)
            missing_keys = []
        else:  # loaded without the layer above
            where = Source(
                state_dict, prefix.removesuffix(".") or "weight", ((prefix + G, prefix + V),)
            )
            if where.keys() and takes_both:
                _load(where, self, prefix, local_metadata, error_msgs)
                self.tell(error_msgs, [])
                del self._visit  # that is now
                missing_keys = []
        if takes_both:
            both = (prefix + G, prefix + V)
            state_dict = {key: t for key, t in state_dict.items() if key not in both}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def split(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The g and v of a weight, through all that is stacked on the weight norm."""
        return _split(self, weight)

    def right_inverse(self, value: Tensor) -> None:
        """What assigning a weight to the layer means; see :func:`assign_weight`."""
        assign_weight(self, value)

    def takes_both(self, state_dict: Mapping[str, Any], prefix: str) -> bool:
        """Whether g and v are to be loaded together from a dict. What to do is left to torch where
        they are not there to be loaded, as in the views of FSDP's first version, and where the dict
        has keys of what one of them is computed from."""
        within = prefix + "parametrizations."
        return self._has_both() and not (
            own_parametrizations(self) and any(key.startswith(within) for key in state_dict)
        )

    def _has_both(self) -> bool:
        for name in (G, V):
            inner = own_parametrizations(self).get(name)
            if inner is None:
                there = name in self._parameters or name in self._buffers
            else:
                there = isinstance(inner, WeightNormOriginals) and inner._has_both()
            if not there:
                return False
        return True

    def tell(self, error_msgs: list[str], keys: list[str]) -> None:
        """Say that g and v have been loaded, to the lists that they are computed by too."""
        self._visit = _Visit(error_msgs, keys)
        for inner in own_parametrizations(self).values():
            if isinstance(inner, WeightNormOriginals):
                inner.tell(error_msgs, [])


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
        below = f"{prefix}parametrizations.{self.name}."
        if not (isinstance(weights, WeightNormOriginals) and weights.takes_both(state_dict, below)):
            return
        own = module._parameters.keys() | module._buffers.keys()
        has_own = bool(own & set(legacy_keys(self.name)))
        where = source(state_dict, prefix, self.name, legacy=not has_own)
        if not (keys := where.keys()):
            return
        _load(where, weights, below, local_metadata, error_msgs)
        weights.tell(error_msgs, keys)


def _split(weights: parametrize.ParametrizationList, weight: Tensor) -> tuple[Tensor, Tensor]:
    for parametrization in reversed(stacked_in(weights)):
        if type(parametrization) is TorchWeightNorm:
            weight = split_for_torch(weight, parametrization.dim)
        else:
            weight = parametrization.right_inverse(weight)
    return weight


@torch.no_grad()
def assign_weight(weights: parametrize.ParametrizationList, value: Tensor) -> None:
    """Write the g and v of a weight into the memory that they have: CUDA graphs, flat buffers and
    other processes may know it. A g or v that has a weight norm itself is assigned to in turn.

    A weight of another shape goes torch's way: v takes over the memory of what was given,
    and g has new memory.

    Args:
        weights: the parametrizations of one parameter, a weight norm first.
        value: what the parameter is to be.
    """
    for parametrization in stacked_in(weights):
        if not hasattr(parametrization, "right_inverse"):
            kind = type(parametrization).__name__
            raise RuntimeError(f"parametrization {kind} does not implement right_inverse.")
    g, v = _split(weights, value)
    expected, got = weights.original1.shape, v.shape
    if got != expected or g.numel() != weights.original0.numel():
        if own_parametrizations(weights):
            raise ValueError(f"v: expected shape {tuple(expected)}, got {tuple(got)}")
        parametrize.ParametrizationList.right_inverse(weights, value)
        return
    for owner, name, t in _places(weights, (g, v)):
        if name in own_parametrizations(owner):  # not of ours
            setattr(owner, name, t)
        else:
            getattr(owner, name).copy_(t)


def _places(
    weights: parametrize.ParametrizationList, pair: tuple[Tensor, Tensor]
) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Where a g and a v are kept: the module, the name there, and what belongs there. One that has
    a weight norm of ours is kept as a g and a v itself."""
    for name, t in zip((G, V), pair, strict=True):
        inner = own_parametrizations(weights).get(name)
        if isinstance(inner, WeightNormOriginals):
            yield from _places(inner, inner.split(t.to(getattr(weights, name).dtype)))
        else:
            yield weights, name, t


def _load(
    where: Source,
    weights: WeightNormOriginals,
    prefix: str,
    local_metadata: dict[str, Any],
    error_msgs: list[str],
) -> None:
    compose = weights[0].forward if len(stacked_in(weights)) == 1 else None
    target = Target(weights.original0, weights.original1, weights.split, compose)
    load_weight(where, target, partial(_places, weights), prefix, local_metadata, error_msgs)


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
