"""Converts flat checkpoints one weight norm at a time, with no more than that in memory."""

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
    """Old keys that are converted together into new keys."""

    keys: list[str]
    homes: dict[str, int]
    """Each new key with the number of the input file whose successor will hold it."""
    is_converted: bool


class Flat:
    """A checkpoint in one or several open files, and its converted form.

    Args:
        shards: the open files.
        conversion: converts the weights, and keeps the list of changes.

    Raises:
        BadInput: if the checkpoint contradicts itself.
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
        """The number of elements that the conversion adds; negative if it removes some."""
        new = sum(spec.shape.numel() for spec in self._new.values())
        return new - sum(self._shape(key).numel() for key in self._homes)

    def shards(self) -> list[int]:
        """Return the numbers of the input files whose successors will hold any tensor."""
        return sorted({home for part in self._parts for home in part.homes.values()})

    def metadata(self, shard: int | None = None) -> dict[str, str]:
        """Return the metadata of one file, or of all files together if ``shard`` is None."""
        chosen = self._shards if shard is None else [self._shards[shard]]
        return {key: text for s in chosen for key, text in (s.metadata or {}).items()}

    def specs(self, shard: int | None = None) -> dict[str, Spec]:
        """Return the new specs of one file, or of all files together if ``shard`` is None."""
        homes = {key: home for part in self._parts for key, home in part.homes.items()}
        return {k: spec for k, spec in self._new.items() if shard in (None, homes[k])}

    def tensors(self, shard: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of :meth:`specs` in any order. Each one is made only when it is asked
        for."""
        again = self._conversion.again()
        for part in self._parts:
            wanted = [key for key, home in part.homes.items() if shard in (None, home)]
            if wanted:
                tensors = self._load(part.keys)
                tensors = again.convert(tensors) if part.is_converted else tensors
                yield from ((key, tensors[key]) for key in wanted)

    def _part(self, keys: list[str], new: Iterable[str]) -> _Part:
        if len(keys) > 2:  # one weight in several layouts: errors must come before any writing
            self._conversion.again().convert(self._load(keys))
        # New keys go into the file of v. The file of g may be another one.
        largest = self._homes[max(keys, key=lambda key: self._shape(key).numel())]
        return _Part(keys, {k: self._homes.get(k, largest) for k in new}, is_converted=True)

    def _shape(self, key: str) -> Tensor:
        """Return a meta tensor with the shape and dtype of a key; equal specs share one tensor."""
        spec = self._shards[self._homes[key]].specs[key]
        if spec not in self._empty:
            self._empty[spec] = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        return self._empty[spec]

    def _load(self, keys: list[str]) -> dict[str, Tensor]:
        return {key: self._shards[self._homes[key]].tensor(key) for key in keys}
