"""Loading of a weight-normed layer, when ``load_state_dict`` reaches it.

torch loads a tree of modules from its root, each module with the part of the dict below its prefix.
Other libraries give all modules of a tree one dict, which may be the caller's. So no key of a dict
is renamed. Instead, a hook on the layer, which sees the keys of all layouts, loads g and v into the
list of parametrizations below the layer, and the list keeps them when its turn comes. If hooks of
others, which may change the dict, run between the two, the list loads g and v instead.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm as TorchWeightNorm

from ..census import (
    legacy_hooks,
    originals,
    own_parametrizations,
    parametrizations_of,
    stacked_in,
)
from ..keys import G, V, legacy_keys
from ..splitting import split_for_torch
from .legacy import restore_loading
from .pairs import Source, Target, forget, load_weight, source


@dataclass(frozen=True)
class _Visit:
    """A message that a list of parametrizations gets before its turn in a call of
    ``load_state_dict``."""

    error_msgs: list[str]
    """The list that the call passes to all modules; its identity tells calls apart."""
    where: Source | None
    """Where g and v are to be loaded from; None if they have been loaded."""
    keys: Collection[str] = ()
    """The keys from which g and v have been loaded."""

    def is_loaded_in(self, error_msgs: list[str]) -> bool:
        return self.where is None and self.error_msgs is error_msgs


class WeightNormOriginals(parametrize.ParametrizationList):
    """A ``ParametrizationList`` that loads both g and v or neither."""

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
        lists = missing_keys, unexpected_keys, error_msgs
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, strict, *lists)
        visit: _Visit | None = self.__dict__.pop("_visit", None)
        if visit is not None and visit.error_msgs is not error_msgs:  # from a failed call
            visit = None
        is_loaded = visit is not None and visit.where is None
        keys = () if visit is None else visit.keys
        if self.takes_both(state_dict, prefix):
            if not is_loaded:
                where = _where(None if visit is None else visit.where, state_dict, prefix)
                if keys := where.keys():
                    self.load(where, prefix, local_metadata, error_msgs)
                    is_loaded = True
            both = (prefix + G, prefix + V)
            state_dict = {key: t for key, t in state_dict.items() if key not in both}
        if is_loaded:
            forget(keys, unexpected_keys)
            lists = [], unexpected_keys, error_msgs
        with _without_load_hooks(self):  # these hooks have run already
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)

    def split(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Split a weight into g and v, through all parametrizations stacked on the weight norm."""
        return _split(self, weight)

    def right_inverse(self, value: Tensor) -> None:
        """Assign a weight to the layer; see :func:`assign_weight`."""
        assign_weight(self, value)

    def takes_both(self, state_dict: Mapping[str, Any], prefix: str) -> bool:
        """Whether this list loads g and v together from a dict. torch loads them if the list does
        not have both, as in the views of FSDP's first version, or if the dict has keys of
        parametrizations of g or v."""
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

    def tell(self, error_msgs: list[str], where: Source) -> None:
        """Tell the list, before its turn, where to load g and v from."""
        if self._visit is None or not self._visit.is_loaded_in(error_msgs):
            self._visit = _Visit(error_msgs, where)

    def tell_loaded(self, error_msgs: list[str], keys: Collection[str] = ()) -> None:
        """Tell the list, before its turn, that g and v have been loaded."""
        self._visit = _Visit(error_msgs, None, keys)

    def load(
        self,
        where: Source,
        prefix: str,
        local_metadata: dict[str, Any],
        error_msgs: list[str],
    ) -> None:
        """Load g and v. If lists of parametrizations compute g or v, tell them that these are
        loaded."""
        compose = self[0].forward if len(stacked_in(self)) == 1 else None
        target = Target(*originals(self), self.split, compose)
        load_weight(where, target, partial(_places, self), prefix, local_metadata, error_msgs)
        self._tell_inner(error_msgs)

    def _tell_inner(self, error_msgs: list[str]) -> None:
        for inner in own_parametrizations(self).values():
            if isinstance(inner, WeightNormOriginals):
                inner.tell_loaded(error_msgs)
                inner._tell_inner(error_msgs)


@contextmanager
def _without_load_hooks(module: nn.Module) -> Iterator[None]:
    hooks = module._load_state_dict_pre_hooks
    module._load_state_dict_pre_hooks = OrderedDict()
    try:
        yield
    finally:
        module._load_state_dict_pre_hooks = hooks


def _where(told: Source | None, state_dict: Mapping[str, Any], prefix: str) -> Source:
    """Where a list finds g and v: keys below ``prefix`` are taken from the dict that the list gets,
    and keys of other layouts from the source that its layer's hook told it."""
    pair = (prefix + G, prefix + V)
    if told is None:  # the list is loaded without its layer
        return Source(state_dict, prefix.removesuffix(".") or "weight", (pair,))
    keys = told.keys()
    entries = {key: told.state_dict[key] for key in keys if key not in pair}
    entries.update({key: state_dict[key] for key in pair if key in state_dict})
    return replace(told, state_dict=entries)


class LoadHook:
    """A load hook that loads g and v of a layer from any layout.

    It does nothing if the weight norm is gone: ``parametrize`` can remove the weight norm without
    this hook, and a plain layer must see the keys as they are.
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
        weights = parametrizations_of(module, self.name)
        if not isinstance(weights, WeightNormOriginals):
            return
        own = module._parameters.keys() | module._buffers.keys()
        has_own = bool(own & set(legacy_keys(self.name)))
        where = source(state_dict, prefix, self.name, legacy=not has_own)
        below = f"{prefix}parametrizations.{self.name}."
        if self._is_followed(module, weights):
            weights.tell(error_msgs, where)
        elif (keys := where.keys()) and weights.takes_both(state_dict, below):
            weights.load(where, below, local_metadata, error_msgs)
            weights.tell_loaded(error_msgs, keys)

    def _is_followed(self, module: nn.Module, weights: nn.Module) -> bool:
        """Whether a hook of another library runs after this hook and before the list loads."""
        modules = module, module.get_submodule("parametrizations"), weights
        hooks, *later = (list(load_hooks(m).values()) for m in modules)
        after = chain(hooks[hooks.index(self) :], *later)
        return not all(isinstance(hook, LoadHook) for hook in after)


def _split(weights: parametrize.ParametrizationList, weight: Tensor) -> tuple[Tensor, Tensor]:
    value: Any = weight
    parametrization: Any
    for parametrization in reversed(stacked_in(weights)):
        if type(parametrization) is TorchWeightNorm:
            value = split_for_torch(value, parametrization.dim)
        else:
            value = parametrization.right_inverse(value)
    return value


@torch.no_grad()
def assign_weight(weights: parametrize.ParametrizationList, value: Tensor) -> None:
    """Write the g and v of a weight into their existing memory, to which CUDA graphs, flat buffers
    and other processes may refer. If g or v has a weight norm itself, its own g and v are written.

    A weight of another shape is assigned as torch does it: v takes over the memory of ``value``,
    and g gets new memory.

    Args:
        weights: the parametrizations of one parameter, a weight norm first.
        value: the new value of the parameter.
    """
    for parametrization in stacked_in(weights):
        if not hasattr(parametrization, "right_inverse"):
            kind = type(parametrization).__name__
            raise RuntimeError(f"parametrization {kind} does not implement right_inverse.")
    g, v = _split(weights, value)
    own_g, own_v = originals(weights)
    expected, got = own_v.shape, v.shape
    if got != expected or g.numel() != own_g.numel():
        if own_parametrizations(weights):
            raise ValueError(f"v: expected shape {tuple(expected)}, got {tuple(got)}")
        parametrize.ParametrizationList.right_inverse(weights, value)
        return
    # v is written first, because it may raise an error: then g has not been written either.
    for module, name, t in reversed([*_places(weights, (g, v))]):
        if name in own_parametrizations(module):  # by a parametrization of others
            setattr(module, name, t)
        else:
            getattr(module, name).copy_(t)


def _places(
    weights: parametrize.ParametrizationList, pair: tuple[Tensor, Tensor]
) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """The places of g and v: for each the module, the name in it, and the tensor to write. A g or v
    with a weight norm of this package gives the places of its own g and v instead."""
    for name, t in zip((G, V), pair, strict=True):
        inner = own_parametrizations(weights).get(name)
        if isinstance(inner, WeightNormOriginals):
            yield from _places(inner, inner.split(t.to(getattr(weights, name).dtype)))
        else:
            yield weights, name, t


def register_load_hook(module: nn.Module, name: str) -> dict[int, Any]:
    """Let ``module`` load checkpoints of all layouts into parameter ``name``.

    This replaces a hook that an earlier weight norm left behind, as after
    ``remove_parametrizations``.

    Returns:
        The replaced hooks, as :func:`unregister_load_hook` returns them.
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
        key: hooks.pop(key) for key, hook in load_hooks(module).items() if loads_for(hook) == name
    }


def load_hooks(module: nn.Module) -> dict[int, Callable[..., None]]:
    """The load hooks of a module by their keys, without the wrappers that torch puts around
    them."""
    wrapped: dict[int, Any] = module._load_state_dict_pre_hooks
    return {key: entry.hook for key, entry in wrapped.items()}


def loads_for(hook: Callable[..., None]) -> str | None:
    """The parameter that a load hook belongs to, if the hook is ours or that of torch's weight
    norm."""
    if isinstance(hook, LoadHook):
        return hook.name
    if getattr(hook, "__name__", "") == "_weight_norm_compat_hook":
        return inspect.getclosurevars(hook).nonlocals.get("name")
    return None
