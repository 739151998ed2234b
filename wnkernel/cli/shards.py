"""Checkpoints in several files (shards), with an index that tells the file of each key.

An index such as ``model.safetensors.index.json`` or ``pytorch_model.bin.index.json`` has two parts:
``weight_map`` maps each key to a file name, and ``metadata`` has the ``total_size`` in bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from torch import Tensor

from . import safetensors_files, torch_files
from .errors import BadInput, cannot_read, one_line
from .formats import INDEX, Format, format_of
from .safetensors_files import Spec


@dataclass(frozen=True)
class Shard:
    """An open file of a flat checkpoint."""

    specs: Mapping[str, Spec]
    tensor: Callable[[str], Tensor]
    metadata: Mapping[str, str] | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors of the file. Those of a safetensors file are mapped, not read."""
        return {key: self.tensor(key) for key in self.specs}


@dataclass(frozen=True)
class Index:
    """The contents of an index."""

    files: list[Path]
    """All files that the index names, in the order of the index."""
    weight_map: dict[str, str]
    rest: dict[str, Any]
    """All other entries of the index: most often only ``metadata``."""


@contextmanager
def reading(files: list[Path]) -> Iterator[list[Shard]]:
    """Open all files of a flat checkpoint at once. Tensors are mapped, not read.

    Raises:
        BadInput: if a file cannot be read or holds other things than tensors, or if two files hold
            the same key.
    """
    with ExitStack() as stack:
        shards = [stack.enter_context(_reading(path)) for path in files]
        held: dict[str, Path] = {}
        for path, shard in zip(files, shards, strict=True):
            for key in shard.specs:
                if key in held:
                    raise BadInput(f"{path}: {key} is in {held[key].name} too")
                held[key] = path
        yield shards


@contextmanager
def _reading(path: Path) -> Iterator[Shard]:
    if format_of(path) == Format.SAFETENSORS:
        with safetensors_files.reading(path) as opened:
            yield Shard(opened.specs, opened.tensor, opened.metadata)
        return
    content = torch_files.read(path)
    if not is_flat(content):
        raise BadInput(f"{path}: a shard is expected to be a dict of tensors")
    specs = {key: Spec(t.dtype, t.shape) for key, t in content.items()}
    yield Shard(specs, content.__getitem__)


def is_flat(content: object) -> TypeGuard[dict[str, Tensor]]:
    """Return whether ``content`` is a dict that maps strings to tensors, and nothing else."""
    return isinstance(content, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    )


def read_index(path: Path) -> Index:
    """Read an index.

    Raises:
        BadInput: if the file is no index, or if the index names anything else than files of one
            format in its own folder.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise cannot_read(path, error) from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not JSON, or damaged: {one_line(error)}") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInput(f"{path}: an index is expected to have a weight_map")
    for name in weight_map.values():
        if not (isinstance(name, str) and _is_file_name(name)):
            raise BadInput(f"{path}: {name!r} is no file beside the index")
    files = [path.with_name(name) for name in dict.fromkeys(weight_map.values())]
    if len({format_of(file) for file in files}) > 1:
        raise BadInput(f"{path}: shards of different formats")
    rest = {key: value for key, value in content.items() if key != "weight_map"}
    return Index(files, weight_map, rest)


def _is_file_name(name: str) -> bool:
    """Return whether ``name`` names a file in the same folder, on every system."""
    return Path(name).name == name not in ("", "..") and not any(c in name for c in "\\\0")


def check_index(path: Path, index: Index, shards: list[Shard]) -> None:
    """Compare an index with its files.

    Raises:
        BadInput: if the index names a file for a key, and that file does not hold the key.
    """
    held = {file.name: shard.specs for file, shard in zip(index.files, shards, strict=True)}
    for key, name in index.weight_map.items():
        if key not in held[name]:
            raise BadInput(f"{path}: {key} is not in {name}")


def shard_paths(index: Path, count: int) -> list[Path]:
    """Return names for the ``count`` files of a new index, as transformers chooses them."""
    base = index.name.removesuffix(INDEX)
    stem, _, suffix = base.rpartition(".")
    return [index.with_name(f"{stem}-{i:05d}-of-{count:05d}.{suffix}") for i in range(1, count + 1)]


def index_text(rest: Mapping[str, Any], files: Mapping[str, str], total: int, numel: int) -> bytes:
    """Return the text of a new index.

    Args:
        rest: the entries of the old index without its ``weight_map``.
        files: the new ``weight_map``.
        total: the bytes of all tensors together.
        numel: the number of elements that the conversion adds; negative if it removes some.
    """
    metadata = rest.get("metadata")
    metadata = dict(metadata) if isinstance(metadata, dict) else {}
    metadata["total_size"] = total
    if isinstance(metadata.get("total_parameters"), int):
        metadata["total_parameters"] += numel
    content = {**rest, "metadata": metadata, "weight_map": dict(files)}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
