"""Tells the format of a file."""

from __future__ import annotations

import enum
import stat
from pathlib import Path

from .errors import BadInput, WrongUsage, cannot_read
from .torch_files import ZIP

INDEX = ".index.json"
"""The ending of the name of an index of shards."""


class Format(enum.Enum):
    """The formats that the command line reads and writes."""

    TORCH = "torch"
    SAFETENSORS = "safetensors"
    INDEX = "index"


SUFFIXES = {
    ".pt": Format.TORCH,
    ".pth": Format.TORCH,
    ".bin": Format.TORCH,
    ".ckpt": Format.TORCH,
    ".safetensors": Format.SAFETENSORS,
}

_PICKLE = b"\x80"


def format_of(path: Path) -> Format:
    """Tell the format of an input by its name, or else by its first bytes.

    Raises:
        BadInput: if the file cannot be read, or if the name and the first bytes tell nothing or
            contradict each other.
    """
    named = _by_name(path)
    try:
        str(path).encode()
        if stat.S_ISFIFO(path.stat().st_mode):  # open() would wait until a process writes to it
            raise BadInput(f"{path}: is no ordinary file")
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise cannot_read(path, error) from None
    except UnicodeEncodeError:
        raise BadInput(f"{path}: a name that is not UTF-8, which torch cannot open") from None
    found = None
    if head[4:] == b"\0\0\0\0{":  # the length of the header in 8 bytes, then JSON
        found = Format.SAFETENSORS
    elif head.startswith((ZIP, _PICKLE)):
        found = Format.TORCH
    if named and found and named != found:
        raise BadInput(f"{path}: looks like a file of {found.value} by its contents; rename it")
    if kind := named or found:
        return kind
    raise BadInput(f"{path}: neither its name nor its contents are those of a checkpoint")


def output_format(path: Path, source: Path, kind: Format) -> Format:
    """Tell the format of an output by its name, or else take the format of the input.

    Args:
        path: the output.
        source: the input.
        kind: the format of the input.

    Raises:
        WrongUsage: if the name has an unknown ending, does not tell whether to write an index or
            one file, or is that of an index where the input has none.
    """
    named = _by_name(path)
    if named is None and path.suffix not in ("", source.suffix):
        known = ", ".join([*SUFFIXES, INDEX])
        raise WrongUsage(f"{path}: expected a name that ends in one of {known}")
    if named is None and kind == Format.INDEX:
        raise WrongUsage(f"{path}: name one file, or an index")
    if named == Format.INDEX and kind != Format.INDEX:
        raise WrongUsage(f"{path}: the input is not split, name one file")
    if named == Format.INDEX and Path(path.name.removesuffix(INDEX)).suffix not in SUFFIXES:
        raise WrongUsage(f"{path}: expected a name such as model.safetensors{INDEX}")
    return named or kind


def _by_name(path: Path) -> Format | None:
    if path.name.endswith(INDEX):
        return Format.INDEX
    return SUFFIXES.get(path.suffix.lower())
