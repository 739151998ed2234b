"""Reads and writes files of ``torch.save``."""

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
"""The bytes of memory that are allowed for each byte of a pickle. One byte can make a large object:
an empty dict."""
OLD_PICKLE = 64 << 20
"""The bytes that are assumed for the pickle of a file in the old format, where the pickle and the
tensors are not in separate parts."""
SPARE = 1 << 30
"""The bytes of memory that reading the smallest file may take."""

_STORAGE = re.compile(r".*/data/\d+")

_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
"""Matches torch's name for a function or class that a pickle wants to import."""


def read(path: Path) -> object:
    """Return the saved object with its tensors on the CPU, mapped into memory if possible.

    No code from the file is run. Memory is limited to the most that a file of its size can need:
    twice the size of the file, a hundred times the size of its pickle, and 1 GiB.

    Raises:
        BadInput: if the file does not exist, is truncated or corrupt, or needs code to be run.
        OutOfMemory: if reading needs more memory than the limit or than there is.
    """
    try:
        with path.open("rb") as file:
            mapped = file.read(len(ZIP)) == ZIP  # torch saves zip archives since 1.6
        size = path.stat().st_size
        with memory_limit(2 * size + SPARE):
            pickled = _check_parts(path, size) if mapped else min(size, OLD_PICKLE)
        with memory_limit(2 * size + PICKLED * pickled + SPARE), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # all that matters comes as an error too
            content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
        _check_attributes(path, content)
        return content
    except CliError:
        raise
    except OSError as error:
        raise cannot_read(path, error) from None
    except zipfile.BadZipFile as error:
        raise BadInput(f"{path}: damaged or cut off: {one_line(error)}") from None
    except Exception as error:  # bytes that are no pickle can raise any type
        raise (out_of_memory(error, path) or BadInput(f"{path}: {_why(error)}")) from None


def _check_parts(path: Path, size: int) -> int:
    """Verify the checksums of all parts of the archive, which torch does not do, and refuse parts
    that are larger than their bytes in the file. Return how many bytes are no storages of tensors.
    """
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
            if part.CRC == 0:  # torch.serialization.set_crc32_options(False) leaves checksums out
                continue
            with archive.open(part) as content:
                while content.read(1 << 20):
                    pass
    return sum(part.file_size for part in parts if not _STORAGE.fullmatch(part.filename))


def _check_attributes(path: Path, content: object) -> None:
    """Refuse dicts and tensors with attributes that hide those of their classes. With an attribute
    ``items``, for example, ``items()`` of a dict would call that attribute."""
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
        writer: the output.
        content: the object to save.
        source: the input that the object comes from, for the message.

    Raises:
        BadInput: if torch cannot save the object, although it could load it.
    """
    try:
        torch.save(content, writer)  # type: ignore[arg-type]  # it needs write() and flush() only
    except (AttributeError, RuntimeError, TypeError, ValueError, pickle.PickleError) as error:
        if writer.failure or out_of_memory(error):
            raise
        raise BadInput(f"{source}: torch cannot save what is in it: {one_line(error)}") from None


def _why(error: Exception) -> str:
    """Tell why a file was not loaded. torch's own message advises to run the code of the file."""
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
