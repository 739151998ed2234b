"""Flat checkpoints, a weight at a time: no more than one weight norm is in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..keys import weight_keys
from .conversion import Conversion, keys_of
from .safetensors_files import Spec
from .shards import Shard


@dataclass(frozen=True)
class _Part:
    """Keys that become other keys together."""

    keys: list[str]
    homes: dict[str, int]
    """The new keys, and in which file each will be, by its number among those that are there."""
    is_converted: bool


class Flat:
    """A checkpoint in one or several open files, and what it will be.

    Args:
        shards: the files.
        conversion: gets to know what changes.

    Raises:
        BadInput: it contradicts itself.
    """

    def __init__(self, shards: Sequence[Shard], conversion: Conversion) -> None:
        self._shards = shards
        self._conversion = conversion
        self._homes = {key: i for i, shard in enumerate(shards) for key in shard.specs}
        self._empty: dict[Spec, Tensor] = {}
        shapes = {key: self._shape(key) for key in self._homes}
        found = conversion.find(shapes)
        new = conversion.convert(shapes, found=found)
        self._new = {key: Spec(t.dtype, t.shape) for key, t in new.items()}
        self._parts: list[_Part] = []
        alone = dict.fromkeys(shapes)
        for weight in found:
            keys = keys_of(weight, shapes)
            if not all(key in self._new for key in keys):
                self._parts.append(self._part(keys, weight_keys(weight.key, conversion.to)))
                for key in keys:
                    del alone[key]
        self._parts += [_Part([k], {k: self._homes[k]}, is_converted=False) for k in alone]

    @property
    def added_numel(self) -> int:
        """By how many elements it grows, or shrinks."""
        new = sum(spec.shape.numel() for spec in self._new.values())
        return new - sum(self._shape(key).numel() for key in self._homes)

    def shards(self) -> list[int]:
        """The files that will still have something in them, by their numbers."""
        return sorted({home for part in self._parts for home in part.homes.values()})

    def metadata(self, shard: int | None = None) -> dict[str, str]:
        """That of one file, or of all of them."""
        chosen = self._shards if shard is None else [self._shards[shard]]
        return {key: text for s in chosen for key, text in (s.metadata or {}).items()}

    def specs(self, shard: int | None = None) -> dict[str, Spec]:
        """What will be in one file, or in all of them."""
        homes = {key: home for part in self._parts for key, home in part.homes.items()}
        return {k: spec for k, spec in self._new.items() if shard in (None, homes[k])}

    def tensors(self, shard: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """The same in any order, each made when its turn comes."""
        again = self._conversion.again()
        for part in self._parts:
            wanted = [key for key, home in part.homes.items() if shard in (None, home)]
            if wanted:
                tensors = self._load(part.keys)
                tensors = again.convert(tensors) if part.is_converted else tensors
                yield from ((key, tensors[key]) for key in wanted)

    def _part(self, keys: list[str], new: Iterable[str]) -> _Part:
        if len(keys) > 2:  # spellings that have to agree: before anything is written
            self._conversion.again().convert(self._load(keys))
        # New keys go where v was, which may be another file than that of g.
        largest = self._homes[max(keys, key=lambda key: self._shape(key).numel())]
        return _Part(keys, {k: self._homes.get(k, largest) for k in new}, is_converted=True)

    def _shape(self, key: str) -> Tensor:
        """A tensor without data: one for all that are alike, and what is computed from it too."""
        spec = self._shards[self._homes[key]].specs[key]
        if spec not in self._empty:
            self._empty[spec] = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        return self._empty[spec]

    def _load(self, keys: list[str]) -> dict[str, Tensor]:
        return {key: self._shards[self._homes[key]].tensor(key) for key in keys}
