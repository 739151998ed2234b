"""Which parameters are under weight norm: what a dict shows, and what a module knows."""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm as TorchWeightNorm
from torch.nn.utils.weight_norm import WeightNorm as LegacyHook

from ..problem import FLOAT_DTYPES
from .layouts import (
    LAYOUTS,
    PARAMETRIZED,
    infer_dim,
    legacy_hooks,
    own_parametrizations,
    stacked_in,
    weight_keys,
)

_PARAMETRIZED_KEY = re.compile(r"((?:.*\.)?)parametrizations\.([^.]+)\.(.+)", re.DOTALL)
_ORIGINAL = re.compile(r"(?:.*\.)?parametrizations\.[^.]+\.original[01]", re.DOTALL)


@dataclass(frozen=True)
class NormedWeight:
    """A weight-normed parameter of a state dict."""

    key: str
    """That of the folded weight."""
    dim: int
    shape: torch.Size
    g_shape: torch.Size
    pairs: tuple[tuple[str, str], ...] = ()
    """The keys of g and v in the layouts that the dict has, parametrized first."""
    by_torch: bool = False
    """Whether it is known that torch's own weight norm computes it."""


def find_normed_weights(
    state_dict: Mapping[str, Any], known: Container[str] = ()
) -> list[NormedWeight]:
    """The weights that a dict has g and v of.

    Args:
        state_dict: keys to tensors, which may be on the meta device.
        known: keys of folded weights that are normed for certain.

    Raises:
        ValueError: half of a parametrized pair.
    """
    pairs: dict[str, list[tuple[str, str]]] = {}
    for key, pair in (*_parametrized_pairs(state_dict), *_legacy_pairs(state_dict, known)):
        pairs.setdefault(key, []).append(pair)
    weights = []
    for key, spelled in pairs.items():
        g, v = (state_dict[k] for k in spelled[0])
        dim = infer_dim(g.shape, v.shape)
        weights.append(NormedWeight(key, dim, v.shape, g.shape, tuple(spelled)))
    return weights


def _parametrized_pairs(state_dict: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, str]]]:
    below: dict[tuple[str, str], set[str]] = {}
    for key in state_dict:
        if isinstance(key, str) and (match := _PARAMETRIZED_KEY.fullmatch(key)):
            below.setdefault(match.groups()[:2], set()).add(match[3])
    # each g and v that is parametrized itself
    nested = {key for key in map("".join, below) if _ORIGINAL.fullmatch(key)}
    for (prefix, name), found in below.items():
        if prefix + name in nested:
            continue
        g, v = weight_keys(prefix + name, PARAMETRIZED)
        if found in ({"original0"}, {"original1"}):
            present, missing = (g, v) if g in state_dict else (v, g)
            if missing in nested:
                continue
            raise ValueError(
                f'state_dict: expected "{missing}" beside "{present}", got no such key'
            )
        if found == {"original0", "original1"} and _fit(state_dict[g], state_dict[v]):
            yield prefix + name, (g, v)


def _legacy_pairs(
    state_dict: Mapping[str, Any], known: Container[str]
) -> Iterator[tuple[str, tuple[str, str]]]:
    for g in state_dict:
        if not (isinstance(g, str) and g.endswith("_g")):
            continue
        key = g.removesuffix("_g")
        v, name = f"{key}_v", key.rpartition(".")[2]
        if not (name and v in state_dict and _fit(state_dict[g], state_dict[v])):
            continue
        norms = state_dict[g].numel()
        if key in known or "weight" in name or 1 < norms < state_dict[v].numel():
            yield key, (g, v)


def _fit(g: Any, v: Any) -> bool:
    return is_float(g) and is_float(v) and infer_dim(g.shape, v.shape) is not None


def is_float(t: Any) -> bool:
    """Whether an entry can be g, v or w: a dense tensor of a dtype that weight norm computes."""
    return (
        isinstance(t, Tensor)
        and t.layout == torch.strided
        and t.dtype in FLOAT_DTYPES  # quantized ones are of other dtypes
    )


@dataclass(frozen=True)
class Like:
    """What the ``like`` of :func:`convert_state_dict` tells of the layers."""

    keys: Container[str] = ()
    """All that its state dict has."""
    weights: Mapping[str, NormedWeight] = field(default_factory=dict)
    """Its weight norms, by the keys of the folded weights."""
    eps: Mapping[str, float] = field(default_factory=dict)
    """Of those that a module has."""
    others: Collection[str] = ()
    """The weights that a module computes otherwise than from g and v alone."""

    def check_related(self, state_dict: Mapping[str, Any]) -> None:
        """Refuse a dict of another model, or of the same below another prefix.

        Raises:
            ValueError: there are weight norms, and no key of either is known to the other.
        """
        if not (self.weights and state_dict):
            return
        weights = (*self.weights, *self.others)
        known = {key for w in weights for layout in LAYOUTS for key in weight_keys(w, layout)}
        if not any(key in known or key in self.keys for key in state_dict):
            first, got = next(iter(self.weights)), next(iter(state_dict))
            raise ValueError(
                f'like: expected a model that state_dict could be of, got one with "{first}", and '
                f'no key of it in a dict that begins with {got!r}: prefixes such as "module." '
                'and "_orig_mod." have to be the same'
            )


def weights_of(like: nn.Module | Mapping[str, Any] | None) -> Like:
    """The normed weights of ``like``. Of a module they are known, whatever their names."""
    if like is None:
        return Like()
    if isinstance(like, Mapping):
        return Like(like.keys(), {weight.key: weight for weight in find_normed_weights(like)})
    if not isinstance(like, nn.Module):
        raise TypeError(f"like: expected a module or a dict, got {type(like).__name__}")
    state_dict = like.state_dict()
    legacy: set[str] = set()
    torchs: set[str] = set()
    others: set[str] = set()
    eps: dict[str, float] = {}
    for path, module in like.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name, (_, hook) in legacy_hooks(module).items():
            (legacy if type(hook) is LegacyHook else others).add(prefix + name)
        for name, norms in own_parametrizations(module).items():
            (norm, *stacked), key = stacked_in(norms), prefix + name
            is_nested = bool(own_parametrizations(norms))  # g or v is parametrized itself
            if (
                stacked
                or is_nested
                or (isinstance(norm, TorchWeightNorm) and type(norm) is not TorchWeightNorm)
            ):
                others.add(key)
            else:
                eps[key] = getattr(norm, "eps", 0.0)
                if isinstance(norm, TorchWeightNorm):
                    torchs.add(key)
    known = legacy | {key for key, _ in _parametrized_pairs(state_dict)} - others
    found = {weight.key: weight for weight in find_normed_weights(state_dict, legacy)}
    weights = {
        key: replace(weight, by_torch=key in torchs | legacy)
        for key, weight in found.items()
        if key in known
    }
    return Like(state_dict.keys(), weights, eps, others)
