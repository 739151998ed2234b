"""Checkpoints in several files, with an index that says which key is where.

In ``model.safetensors.index.json`` and ``pytorch_model.bin.index.json``, ``weight_map`` has a file
name for each key, and ``metadata`` has ``total_size`` in bytes.
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
        """All of them: mapped, where they are in a safetensors file."""
        return {key: self.tensor(key) for key in self.specs}


@dataclass(frozen=True)
class Index:
    """What an index says."""

    files: list[Path]
    """All that it names, in its order."""
    weight_map: dict[str, str]
    rest: dict[str, Any]
    """What else it holds: ``metadata``, most often."""


@contextmanager
def reading(files: list[Path]) -> Iterator[list[Shard]]:
    """Open all files of a flat checkpoint at once; tensors are mapped, not read.

    Raises:
        BadInput: one of them cannot be read, holds other things than tensors, or a key that another
            holds too.
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
    """Whether it is a dict of tensors and nothing else."""
    return isinstance(content, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    )


def read_index(path: Path) -> Index:
    """Read an index.

    Raises:
        BadInput: it is no index, or names something else than files beside it.
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
    """Whether it names something in a folder and nothing elsewhere, on any system."""
    return Path(name).name == name not in ("", "..") and not any(c in name for c in "\\\0")


def check_index(path: Path, index: Index, shards: list[Shard]) -> None:
    """Compare an index with what its files hold.

    Raises:
        BadInput: it lists a key that is not where it should be.
    """
    held = {file.name: shard.specs for file, shard in zip(index.files, shards, strict=True)}
    for key, name in index.weight_map.items():
        if key not in held[name]:
            raise BadInput(f"{path}: {key} is not in {name}")


def shard_paths(index: Path, count: int) -> list[Path]:
    """Names for the files of a new index, as transformers chooses them."""
    base = index.name.removesuffix(INDEX)
    stem, _, suffix = base.rpartition(".")
    return [index.with_name(f"{stem}-{i:05d}-of-{count:05d}.{suffix}") for i in range(1, count + 1)]


def index_text(rest: Mapping[str, Any], files: Mapping[str, str], total: int, numel: int) -> bytes:
    """A new index.

    Args:
        rest: what the old one held besides its ``weight_map``.
        files: the new ``weight_map``.
        total: bytes of all tensors.
        numel: by how many the number of their elements has changed.
    """
    metadata = rest.get("metadata")
    metadata = dict(metadata) if isinstance(metadata, dict) else {}
    metadata["total_size"] = total
    if isinstance(metadata.get("total_parameters"), int):
        metadata["total_parameters"] += numel
    content = {**rest, "metadata": metadata, "weight_map": dict(files)}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
