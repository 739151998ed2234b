"""Which format a file has."""

from __future__ import annotations

import enum
import stat
from pathlib import Path

from .errors import BadInput, WrongUsage, cannot_read
from .torch_files import ZIP

INDEX = ".index.json"
"""How the name of an index of shards ends."""


class Format(enum.Enum):
    """What this program reads and writes."""

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
    """The format of an input: by its name, or else by its first bytes.

    Raises:
        BadInput: neither tells, or they contradict each other, or it cannot be read.
    """
    named = _by_name(path)
    try:
        str(path).encode()
        if stat.S_ISFIFO(path.stat().st_mode):  # opening it would wait for somebody who writes
            raise BadInput(f"{path}: is no ordinary file")
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise cannot_read(path, error) from None
    except UnicodeEncodeError:
        raise BadInput(f"{path}: a name that is not UTF-8, which torch cannot open") from None
    found = None
    if head[4:] == b"\0\0\0\0{":  # a length of 8 bytes, and JSON
        found = Format.SAFETENSORS
    elif head.startswith((ZIP, _PICKLE)):
        found = Format.TORCH
    if named and found and named != found:
        raise BadInput(f"{path}: looks like a file of {found.value} by its contents; rename it")
    if kind := named or found:
        return kind
    raise BadInput(f"{path}: neither its name nor its contents are those of a checkpoint")


def output_format(path: Path, source: Path, kind: Format) -> Format:
    """The format of an output: by its name, or that of the input if the name says nothing.

    Args:
        path: the output.
        source: the input.
        kind: its format.

    Raises:
        WrongUsage: its name is that of something else, or of an index where the input has none.
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
