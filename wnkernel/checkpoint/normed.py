"""The weights under weight norm, as a state dict shows or a module knows them."""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..census import OURS, TORCH_HOOK, census, own_parametrizations
from ..keys import LAYOUTS, PARAMETRIZED, G, V, pair_keys, weight_keys
from ..problem import FLOAT_DTYPES
from .agreement import half, infer_dim

_PARAMETRIZED_KEY = re.compile(r"((?:.*\.)?)parametrizations\.([^.]+)\.(.+)", re.DOTALL)
ORIGINAL_KEY = re.compile(rf"(?:.*\.)?parametrizations\.[^.]+\.(?:{G}|{V})", re.DOTALL)
"""The key of a g or a v in the parametrized layout."""


@dataclass(frozen=True)
class NormedWeight:
    """A weight-normed parameter of a state dict."""

    key: str
    """The key of the folded weight."""
    dim: int
    shape: torch.Size
    g_shape: torch.Size
    pairs: tuple[tuple[str, str], ...] = ()
    """The keys of g and v in the layouts that the dict has, parametrized first."""
    by_torch: bool = False
    """Whether torch's own weight norm is known to compute the weight."""


def find_normed_weights(
    state_dict: Mapping[str, Any], known: Container[str] = ()
) -> list[NormedWeight]:
    """Find the weights whose g and v are in a dict.

    Args:
        state_dict: keys to tensors, which may be on the meta device.
        known: keys of folded weights that are known to be normed.

    Raises:
        ValueError: if a parametrized pair is incomplete.
    """
    pairs: dict[str, list[tuple[str, str]]] = {}
    for key, pair in (*_parametrized_pairs(state_dict), *_legacy_pairs(state_dict, known)):
        pairs.setdefault(key, []).append(pair)
    weights = []
    for key, spelled in pairs.items():
        g, v = (state_dict[k] for k in spelled[0])
        if (dim := infer_dim(g.shape, v.shape)) is not None:
            weights.append(NormedWeight(key, dim, v.shape, g.shape, tuple(spelled)))
    return weights


def _parametrized_pairs(state_dict: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, str]]]:
    below: dict[tuple[str, str], set[str]] = {}
    for key in state_dict:
        if isinstance(key, str) and (match := _PARAMETRIZED_KEY.fullmatch(key)):
            below.setdefault((match[1], match[2]), set()).add(match[3])
    # These are the keys of each g and v that is parametrized itself.
    nested = {key for key in map("".join, below) if ORIGINAL_KEY.fullmatch(key)}
    for (prefix, name), found in below.items():
        if prefix + name in nested:
            continue
        g, v = pair_keys(prefix + name, PARAMETRIZED)
        if found in ({G}, {V}):
            if (v if g in state_dict else g) in nested:
                continue
            raise ValueError(f"state_dict: {half((g, v), state_dict)}")
        if found == {G, V} and _fit(state_dict[g], state_dict[v]):
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
        and t.dtype in FLOAT_DTYPES  # quantized tensors have other dtypes
    )


@dataclass(frozen=True)
class Like:
    """The facts that ``like`` of :func:`convert_state_dict` tells about layers."""

    keys: Container[str] = ()
    """All keys of the state dict of ``like``."""
    weights: Mapping[str, NormedWeight] = field(default_factory=dict)
    """The weight norms of ``like``, by the keys of the folded weights."""
    eps: Mapping[str, float] = field(default_factory=dict)
    """The eps of the weight norms of a module, by the same keys."""
    others: Collection[str] = ()
    """The keys of the weights that a module computes in another way, or from more than a g and a
    v."""

    def check_related(self, state_dict: Mapping[str, Any]) -> None:
        """Refuse a dict of another model, or of the same model below another prefix.

        Raises:
            ValueError: if there are weight norms, and the dict has no key of ``like`` in any
                layout.
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
    """The normed weights of ``like``. A module knows them, whatever their names are."""
    if like is None:
        return Like()
    if isinstance(like, Mapping):
        return Like(like.keys(), {weight.key: weight for weight in find_normed_weights(like)})
    if not isinstance(like, nn.Module):
        raise TypeError(f"like: expected a module or a dict, got {type(like).__name__}")
    state_dict = like.state_dict()
    normed = {weight.path: weight for weight in census(like, shared=True)}
    exact = {key: weight for key, weight in normed.items() if weight.is_exact}
    hooks = {key for key, weight in exact.items() if weight.kind == TORCH_HOOK}
    found = {weight.key: weight for weight in find_normed_weights(state_dict, hooks)}
    weights = {
        key: replace(found[key], by_torch=weight.kind != OURS)
        for key, weight in exact.items()
        if key in found
    }
    eps = {key: weight.eps for key, weight in exact.items()}
    others = {*normed, *_parametrized(like)} - exact.keys()
    return Like(state_dict.keys(), weights, eps, others)


def _parametrized(model: nn.Module) -> Iterator[str]:
    """The parametrized tensors of a model, as a plain model names them."""
    for path, module in model.named_modules(remove_duplicate=False):
        yield from (f"{path}.{name}" if path else name for name in own_parametrizations(module))
