"""Files of ``torch.save``."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from .errors import BadInput, CliError, cannot_read, one_line, out_of_memory
from .limits import memory_limit
from .output import Writer

ZIP = b"PK\x03\x04"

PICKLED = 100
"""Bytes that the objects of a pickle take, for each byte of it: an empty dict is one of it."""
OLD_PICKLE = 64 << 20
"""Bytes of a pickle that is among the tensors of a file, where it cannot be measured."""
SPARE = 1 << 30
"""Bytes that reading the smallest file may take."""

_STORAGE = re.compile(r".*/data/\d+")

_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
"""How torch names what a pickle wants to import."""


def read(path: Path) -> object:
    """What was saved, on the CPU, mapped into memory rather than read where that is possible.

    Nothing that the file wants to run is run, and memory is limited to what a file of its size
    can need: twice its size, a hundred times that of its pickle, and 1 GiB.

    Raises:
        BadInput: no such file, truncated, corrupt, or with contents that need code to be run.
        OutOfMemory: it asks for more than the limit, or than there is.
    """
    try:
        with path.open("rb") as file:
            mapped = file.read(len(ZIP)) == ZIP  # as torch saves since 1.6
        size = path.stat().st_size
        with memory_limit(2 * size + SPARE):
            pickled = _check_parts(path, size) if mapped else min(size, OLD_PICKLE)
        with memory_limit(2 * size + PICKLED * pickled + SPARE), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong comes as an error too
            content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
        _check_attributes(path, content)
        return content
    except CliError:
        raise
    except OSError as error:
        raise cannot_read(path, error) from None
    except zipfile.BadZipFile as error:
        raise BadInput(f"{path}: damaged or cut off: {one_line(error)}") from None
    except Exception as error:  # of any type, where the bytes are no pickle
        raise (out_of_memory(error, path) or BadInput(f"{path}: {_why(error)}")) from None


def _check_parts(path: Path, size: int) -> int:
    """Compare the checksums of all parts, which torch does not; returns how many bytes of them are
    no storages of tensors. None of them may come to more than it takes in the file."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if any(part.filename.endswith("/constants.pkl") for part in parts):
            raise BadInput(f"{path}: refused: a TorchScript program, not a checkpoint")
        for part in parts:
            if part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size:
                raise BadInput(
                    f"{path}: refused: expected parts that are not compressed, as torch.save "
                    f"writes them, got {part.filename} of {part.file_size} bytes in "
                    f"{part.compress_size}"
                )
        if sum(part.file_size for part in parts) > size:
            raise BadInput(f"{path}: damaged: its parts are longer together than the file")
        for part in parts:
            if part.CRC == 0:  # torch.serialization.set_crc32_options(False)
                continue
            with archive.open(part) as content:
                while content.read(1 << 20):
                    pass
    return sum(part.file_size for part in parts if not _STORAGE.fullmatch(part.filename))


def _check_attributes(path: Path, content: object) -> None:
    """Refuse objects with attributes that hide those of their classes: ``items`` of a dict, which
    would not be called then."""
    nodes, seen = [content], set()
    while nodes:
        node = nodes.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, dict):
            nodes += dict.values(node)
        elif isinstance(node, (list, tuple, set)):
            nodes += node
        if not isinstance(node, (dict, Tensor)):
            continue
        kind = type(node).__name__
        for name in getattr(node, "__dict__", ()):
            if hasattr(type(node), name):
                raise BadInput(f"{path}: refused: it has a {kind} with another {name!r}")


def write(writer: Writer, content: object, source: Path) -> None:
    """Write a file of ``torch.save``.

    Args:
        writer: where to.
        content: what to save.
        source: the input that it comes from.

    Raises:
        BadInput: torch cannot save it, though it could be loaded.
    """
    try:
        torch.save(content, writer)  # type: ignore[arg-type]  # it needs write() and flush() only
    except (AttributeError, RuntimeError, TypeError, ValueError, pickle.PickleError) as error:
        if writer.failure or out_of_memory(error):
            raise
        raise BadInput(f"{source}: torch cannot save what is in it: {one_line(error)}") from None


def _why(error: Exception) -> str:
    """Without torch's advice, which is to run the code here."""
    text = str(error)
    wanted = _GLOBAL.search(text)
    if wanted or (
        isinstance(error, pickle.UnpicklingError) and re.search(r"reduce|Can only", text)
    ):
        what = f" ({wanted[1]})" if wanted else ""
        return (
            f"refused: loading it would run code{what}, and none was run; if you trust the file, "
            "load it yourself (torch.load with weights_only=False) and use "
            "wnkernel.convert_state_dict"
        )
    return "damaged, or not a checkpoint that torch can load"
