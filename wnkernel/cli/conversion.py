"""What a conversion does to the keys of state dicts, kept for the report."""

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
    """A weight whose layout is another one afterwards."""

    where: str
    """The part of the file, such as ``generator``; empty for the file itself."""
    weight: str
    """The key that it has when it is folded."""
    source: str
    """Its layouts before, joined by ``+``."""
    target: str
    shape: tuple[int, ...]
    dim: int | None
    """None: one norm over the whole tensor."""


class Conversion:
    """Converts state dicts, and keeps what has changed.

    Args:
        to: the layout wanted.
        eps: of the layers, for folding.
        file: for messages.
        aliases: whether weights that had g and v in common, in whatever parts of a file, share
            their folded weight; all folded weights stay in memory for that.
    """

    def __init__(self, to: str, eps: float, file: Path, *, aliases: bool) -> None:
        self.to = to
        self.file = file
        self.changes: list[Change] = []
        self.already = 0
        """Weight norms that had the layout before."""
        self.halves: list[str] = []
        """Keys that may be one half of a legacy pair, without the other."""
        self._eps = eps
        self._aliases = aliases
        self._folded: dict[Hashable, Tensor] = {}

    def again(self) -> Conversion:
        """The same anew."""
        return Conversion(self.to, self._eps, self.file, aliases=self._aliases)

    def find(self, state_dict: Mapping[str, Any], where: str = "") -> list[NormedWeight]:
        """The weight norms in a state dict.

        Raises:
            BadInput: half of one is missing.
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
        """The same in the other layout.

        Args:
            state_dict: what may have weight norms, beside anything else.
            where: the part of the file that it is.
            found: its weight norms, if :meth:`find` has found them already.

        Raises:
            BadInput: it contradicts itself.
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
        """The same as :meth:`find`, where all g and v are dense tensors with values.

        Raises:
            BadInput: one of them is on the meta device, sparse, quantized or of a subclass.
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
    """Every key of a weight norm, in whichever layout."""
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
    """Keys that hold one tensor."""
    same: dict[Hashable, list[str]] = {}
    for key, t in state_dict.items():
        if t.numel():
            same.setdefault(identity(t), []).append(key)
    return [keys for keys in same.values() if len(keys) > 1]
