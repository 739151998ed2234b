"""``wnkernel convert`` reads a checkpoint, converts it, and writes it or says why it cannot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from . import safetensors_files, shards, torch_files
from .conversion import Change, Conversion, aliases
from .errors import CannotWrite, NothingToConvert
from .flat import Flat
from .formats import SUFFIXES, Format, format_of, output_format
from .output import Advance, Outputs, Writer
from .safetensors_files import Spec
from .tree import Tree

Progress = Callable[[int], AbstractContextManager[Advance]]
"""Takes the number of bytes to write, and shows in a ``with`` block how many are written."""

METADATA = {"format": "pt"}
"""The metadata of safetensors files that hold torch tensors; transformers reads this entry."""


@dataclass(frozen=True)
class Request:
    """The arguments of the command."""

    source: Path
    target: Path | None
    """The output; None in a dry run without an output."""
    to: str
    eps: float
    force: bool
    dry_run: bool


@dataclass(frozen=True)
class Report:
    """What a conversion did, or would do in a dry run."""

    changes: list[Change]
    warnings: list[str]
    written: list[Path]


def convert(request: Request, progress: Progress) -> Report:
    """Convert a checkpoint.

    Raises:
        CliError: if the checkpoint cannot be converted or written. No file was written then.
    """
    kind = format_of(request.source)
    return (_convert_tree if kind == Format.TORCH else _convert_flat)(request, kind, progress)


def _convert_tree(request: Request, kind: Format, progress: Progress) -> Report:
    """Convert a file of torch.save with any contents. Tensors stay mapped where torch can map the
    file; everything else is in memory."""
    source, target = request.source, request.target
    form = output_format(target, source, kind) if target else kind
    conversion = Conversion(request.to, request.eps, source, aliases=True)
    with Outputs([source], force=request.force) as outputs:
        if target:
            outputs.check(target)
        tree = Tree(conversion)
        content = tree.convert(torch_files.read(source))
        _demand_changes(conversion)
        warnings = tree.warnings()
        if form == Format.SAFETENSORS:
            tensors, specs, more = _as_safetensors(source, content)
            warnings += more
        if request.dry_run or target is None:
            return Report(conversion.changes, warnings, [])
        with progress(source.stat().st_size) as advance, outputs.file(target, advance) as writer:
            if form == Format.SAFETENSORS:
                safetensors_files.write(writer, specs, METADATA, tensors.items())
            else:
                torch_files.write(writer, content, source)
        return Report(conversion.changes, warnings, outputs.commit())


def _convert_flat(request: Request, kind: Format, progress: Progress) -> Report:
    """Convert a safetensors file, or several files with an index, one weight norm at a time."""
    source, target = request.source, request.target
    form = output_format(target, source, kind) if target else kind
    index = shards.read_index(source) if kind == Format.INDEX else None
    files = index.files if index else [source]
    of_torch = format_of(files[0]) == Format.TORCH
    conversion = Conversion(request.to, request.eps, source, aliases=of_torch)
    with Outputs([source, *files], force=request.force) as outputs, shards.reading(files) as opened:
        if target:
            outputs.check(target)
        if index:
            shards.check_index(source, index, opened)
        if of_torch:
            conversion.check_kinds({k: t for shard in opened for k, t in shard.tensors().items()})
        flat = Flat(opened, conversion)
        _demand_changes(conversion)
        if target is None:
            return Report(conversion.changes, [], [])
        numbers: Sequence[int | None] = [None]
        paths, file_form = [target], form
        if form == Format.INDEX:
            numbers = flat.shards()
            paths = shards.shard_paths(target, len(numbers))
            file_form = SUFFIXES[paths[0].suffix]
        for path in paths:
            outputs.check(path)
        warnings = []
        lost = dict(flat.metadata().items() - METADATA.items())
        if file_form == Format.TORCH and lost:
            warnings.append(f"not kept, for a file of torch has no place for it: {lost}")
        if file_form == Format.SAFETENSORS and of_torch:
            for shard in opened:
                warnings += _as_safetensors(source, shard.tensors())[2]
        if request.dry_run:
            return Report(conversion.changes, warnings, [])
        total = sum(spec.nbytes for spec in flat.specs().values())
        with progress(total) as advance:
            for path, number in zip(paths, numbers, strict=True):
                with outputs.file(path, advance) as writer:
                    _write_flat(writer, file_form, flat, number, source)
            if index and form == Format.INDEX:
                homes = {
                    key: path.name
                    for path, number in zip(paths, numbers, strict=True)
                    for key in flat.specs(number)
                }
                with outputs.file(target, advance) as writer:
                    writer.write(shards.index_text(index.rest, homes, total, flat.added_numel))
        return Report(conversion.changes, warnings, outputs.commit())


def _write_flat(writer: Writer, form: Format, flat: Flat, number: int | None, source: Path) -> None:
    """Write one file of several, or everything into one file if ``number`` is None."""
    if form == Format.SAFETENSORS:
        metadata = flat.metadata(number) or METADATA
        safetensors_files.write(writer, flat.specs(number), metadata, flat.tensors(number))
    else:
        torch_files.write(writer, dict(flat.tensors(number)), source)


def _demand_changes(conversion: Conversion) -> None:
    if conversion.changes:
        return
    what = "it has no weight norm, or folded ones, which do not show"
    if conversion.already:
        what = f"all its weight norms ({conversion.already}) are {conversion.to} already"
    elif conversion.halves:
        what += f"; {conversion.halves[0]} may be half of one"
    raise NothingToConvert(f"{conversion.file}: nothing to convert, {what}; nothing was written")


def _as_safetensors(
    source: Path, content: object
) -> tuple[dict[str, Tensor], dict[str, Spec], list[str]]:
    """Return the tensors of a safetensors file with ``content``, the specs for its header, and
    warnings about ties that the file cannot express.

    Raises:
        CannotWrite: if ``content`` is anything else than a dict of tensors.
    """
    if not shards.is_flat(content):
        other = "other things"
        if isinstance(content, dict):
            other = next(repr(key) for key, t in content.items() if not shards.is_flat({key: t}))
        raise CannotWrite(
            f"{source}: has more than tensors in it ({other}), which a safetensors file cannot "
            "hold; write a file of torch (.pt)"
        )
    specs = {key: safetensors_files.spec(key, t) for key, t in content.items()}
    return content, specs, _untied(content)


def _untied(state_dict: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{' and '.join(keys)} share their memory, which a safetensors file cannot say: written "
        "one by one"
        for keys in aliases(state_dict)
    ]
