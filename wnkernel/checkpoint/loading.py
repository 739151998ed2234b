"""What runs when ``load_state_dict`` reaches a weight-normed layer.

torch loads a tree of modules from its root, each with the part of the dict below its prefix, and
others walk the tree with one dict for all, which may be the caller's. So nothing is renamed in it:
a hook on the layer, which sees the keys of all layouts, loads g and v into the list of
parametrizations below the layer; the list, when its turn comes, leaves them as they are. Where
hooks of others come between the two, which may change the dict, the list loads instead.
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
    """What a list of parametrizations is told before its turn in a call of ``load_state_dict``."""

    error_msgs: list[str]
    """The list that such a call passes to all modules: it tells calls apart."""
    where: Source | None
    """What there is to load; None: g and v have been loaded."""
    keys: Collection[str] = ()
    """From which keys they have been loaded."""

    def is_loaded_in(self, error_msgs: list[str]) -> bool:
        return self.where is None and self.error_msgs is error_msgs


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
        lists = missing_keys, unexpected_keys, error_msgs
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, strict, *lists)
        visit: _Visit | None = self.__dict__.pop("_visit", None)
        if visit is not None and visit.error_msgs is not error_msgs:  # of a call that failed
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
        with _without_load_hooks(self):  # they have been called
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)

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

    def tell(self, error_msgs: list[str], where: Source) -> None:
        """Say, before its turn, what there is to load."""
        if self._visit is None or not self._visit.is_loaded_in(error_msgs):
            self._visit = _Visit(error_msgs, where)

    def tell_loaded(self, error_msgs: list[str], keys: Collection[str] = ()) -> None:
        """Say, before its turn, that g and v have been loaded."""
        self._visit = _Visit(error_msgs, None, keys)

    def load(
        self,
        where: Source,
        prefix: str,
        local_metadata: dict[str, Any],
        error_msgs: list[str],
    ) -> None:
        """Load g and v, and say so to the lists that compute them, if there are any."""
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
    """Where g and v of a list are to be found. The dict that the list sees knows best about the
    keys below ``prefix``, and what it was told about those in other layouts."""
    pair = (prefix + G, prefix + V)
    if told is None:  # loaded without the layer above
        return Source(state_dict, prefix.removesuffix(".") or "weight", (pair,))
    keys = told.keys()
    entries = {key: told.state_dict[key] for key in keys if key not in pair}
    entries.update({key: state_dict[key] for key in pair if key in state_dict})
    return replace(told, state_dict=entries)


class LoadHook:
    """Has a layer's g and v loaded from whichever layout its keys are in.

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
        """Whether a hook of others is called after this one and before the list loads."""
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
    own_g, own_v = originals(weights)
    expected, got = own_v.shape, v.shape
    if got != expected or g.numel() != own_g.numel():
        if own_parametrizations(weights):
            raise ValueError(f"v: expected shape {tuple(expected)}, got {tuple(got)}")
        parametrize.ParametrizationList.right_inverse(weights, value)
        return
    # v first, which may refuse: then nothing has been written.
    for owner, name, t in reversed([*_places(weights, (g, v))]):
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
        key: hooks.pop(key) for key, hook in load_hooks(module).items() if loads_for(hook) == name
    }


def load_hooks(module: nn.Module) -> dict[int, Callable[..., None]]:
    """The load hooks of a module, which torch keeps wrapped, by their keys."""
    wrapped: dict[int, Any] = module._load_state_dict_pre_hooks
    return {key: entry.hook for key, entry in wrapped.items()}


def loads_for(hook: Callable[..., None]) -> str | None:
    """The parameter that a load hook belongs to, if it is ours or that of torch's weight norm."""
    if isinstance(hook, LoadHook):
        return hook.name
    if getattr(hook, "__name__", "") == "_weight_norm_compat_hook":
        return inspect.getclosurevars(hook).nonlocals.get("name")
    return None
