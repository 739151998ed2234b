"""Finds the weight norms in a checkpoint of any format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.normed import NormedWeight, find_normed_weights
from . import shards, torch_files
from .errors import BadInput
from .formats import Format, format_of
from .tree import state_dicts


def normed_weights(path: Path) -> list[tuple[NormedWeight, torch.dtype]]:
    """Return all weight norms of a checkpoint, each with the dtype of its v.

    Raises:
        BadInput: if the file cannot be read, or if a g or a v is missing.
    """
    with _content(path) as dicts:
        try:
            return [
                (weight, state_dict[weight.pairs[0][1]].dtype)
                for state_dict in dicts
                for weight in find_normed_weights(state_dict)
            ]
        except ValueError as error:
            raise BadInput(f"{path}: {error}") from None


@contextmanager
def _content(path: Path) -> Iterator[list[Mapping[str, Any]]]:
    kind = format_of(path)
    if kind == Format.TORCH:
        yield list(state_dicts(torch_files.read(path)))
        return
    files = shards.read_index(path).files if kind == Format.INDEX else [path]
    with shards.reading(files) as opened:
        yield [{key: t for shard in opened for key, t in shard.tensors().items()}]
