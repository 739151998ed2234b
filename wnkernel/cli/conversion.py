"""Converts state dicts, and keeps a list of the changed weights for the report."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.agreement import identity
from ..checkpoint.convert import convert_found
from ..checkpoint.normed import ORIGINAL_KEY, NormedWeight, find_normed_weights
from ..keys import FOLDED, LEGACY, PARAMETRIZED, weight_keys
from ..observers import PLAIN
from ..problem import WHOLE_TENSOR
from .errors import BadInput

_HALF = re.compile(r"(?:.*\.)?weight[^.]*_([gv])")
_G_OR_V = re.compile(f"{_HALF.pattern}|{ORIGINAL_KEY.pattern}", re.DOTALL)


@dataclass(frozen=True)
class Change:
    """A weight whose layout the conversion changes."""

    where: str
    """The part of the file that holds the weight, such as ``generator``; empty if the whole file is
    the state dict."""
    weight: str
    """The key of the folded weight."""
    source: str
    """The layouts that the weight had before, joined by ``+``."""
    target: str
    shape: tuple[int, ...]
    dim: int | None
    """The dim of the weight norm; None if there is one norm over the whole tensor."""


class Conversion:
    """Converts state dicts, and keeps a list of the changed weights.

    Args:
        to: the layout to convert to.
        eps: the eps of the layers; only folding needs it.
        file: the path that messages name.
        aliases: whether weights with the same g and v, in any parts of a file, share one folded
            weight. If so, all folded weights stay in memory.
    """

    def __init__(self, to: str, eps: float, file: Path, *, aliases: bool) -> None:
        self.to = to
        self.file = file
        self.changes: list[Change] = []
        self.already = 0
        """The number of weight norms that have the layout already."""
        self.halves: list[str] = []
        """Keys that may be a legacy g without its v, or a legacy v without its g."""
        self._eps = eps
        self._aliases = aliases
        self._folded: dict[Hashable, Tensor] = {}

    def again(self) -> Conversion:
        """Return a new conversion with the same settings and no changes yet."""
        return Conversion(self.to, self._eps, self.file, aliases=self._aliases)

    def find(self, state_dict: Mapping[str, Any], where: str = "") -> list[NormedWeight]:
        """Find the weight norms in a state dict.

        Raises:
            BadInput: if a g or a v is missing.
        """
        try:
            return find_normed_weights(state_dict)
        except ValueError as error:
            raise self._bad(where, error) from None

    def convert(
        self,
        state_dict: Mapping[str, Any],
        where: str = "",
        *,
        found: Sequence[NormedWeight] | None = None,
    ) -> dict[str, Any]:
        """Return a state dict with its weight norms in the layout ``to``.

        Args:
            state_dict: keys to tensors or anything else; only weight norms are converted.
            where: the part of the file that holds the state dict.
            found: the weight norms of the state dict, if :meth:`find` was called before.

        Raises:
            BadInput: if the state dict contradicts itself.
        """
        weights = self.find(state_dict, where) if found is None else found
        self.halves += _halves(state_dict)
        try:
            converted = convert_found(state_dict, weights, self.to, self._eps)
        except ValueError as error:
            raise self._bad(where, error) from None
        for weight in weights:
            if all(key in converted for key in keys_of(weight, state_dict)):
                self.already += 1
                continue
            source = "+".join(_layout(weight, pair) for pair in weight.pairs)
            dim = None if weight.dim == WHOLE_TENSOR else weight.dim
            shape = tuple(weight.shape)
            self.changes.append(Change(where, weight.key, source, self.to, shape, dim))
            if self.to == FOLDED and self._aliases:
                pair = tuple(identity(state_dict[key]) for key in weight.pairs[0])
                w = converted[weight.key]
                converted[weight.key] = self._folded.setdefault(pair, w)
        return converted

    def check_kinds(self, state_dict: Mapping[str, Any], where: str = "") -> Sequence[NormedWeight]:
        """Find the weight norms like :meth:`find`, and demand dense g and v with values.

        Raises:
            BadInput: if a g or a v is missing, on the meta device, sparse, quantized or of a
                subclass of Tensor.
        """
        weights = self.find(state_dict, where)
        found = [key for weight in weights for key in keys_of(weight, state_dict)]
        named = [k for k in state_dict if isinstance(k, str) and _G_OR_V.fullmatch(k)]
        for key in (*found, *named):
            t = state_dict[key]
            if isinstance(t, Tensor) and (kind := _other_kind(t)):
                raise self._bad(where, f'expected a dense tensor in "{key}", got {kind}')
        return weights

    def _bad(self, where: str, error: ValueError | str) -> BadInput:
        text = str(error).removeprefix("state_dict: ")
        return BadInput(f"{self.file}: {where}: {text}" if where else f"{self.file}: {text}")


def _other_kind(t: Tensor) -> str | None:
    if t.is_meta:
        return "one on the meta device, which has no values"
    if t.layout != torch.strided:
        return f"a {t.layout} one"
    if t.is_quantized:
        return f"a quantized one ({t.dtype})"
    return None if type(t) in PLAIN else f"a {type(t).__name__}"


def keys_of(weight: NormedWeight, state_dict: Mapping[str, Any]) -> list[str]:
    """Return every key of a weight norm, of all layouts that the state dict has."""
    keys = [key for pair in weight.pairs for key in pair]
    return [*keys, weight.key] if weight.key in state_dict else keys


def _layout(weight: NormedWeight, pair: tuple[str, str]) -> str:
    return LEGACY if pair == weight_keys(weight.key, LEGACY) else PARAMETRIZED


def _halves(state_dict: Mapping[str, Any]) -> list[str]:
    return [
        key
        for key in state_dict
        if isinstance(key, str)
        and (match := _HALF.fullmatch(key))
        and key[:-1] + {"g": "v", "v": "g"}[match[1]] not in state_dict
    ]


def aliases(state_dict: Mapping[str, Tensor]) -> list[list[str]]:
    """Return the lists of keys that hold the same tensor."""
    same: dict[Hashable, list[str]] = {}
    for key, t in state_dict.items():
        if t.numel():
            same.setdefault(identity(t), []).append(key)
    return [keys for keys in same.values() if len(keys) > 1]
