"""Files of ``torch.save``."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from pathlib import Path

import torch

from .errors import BadInput, one_line

ZIP = b"PK\x03\x04"

_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
"""How torch names what a pickle wants to import."""


def read(path: Path) -> object:
    """What was saved, on the CPU, mapped into memory rather than read where that is possible.

    Nothing that the file wants to run is run.

    Raises:
        BadInput: no such file, truncated, corrupt, or with contents that need code to be run.
    """
    try:
        with path.open("rb") as file:
            mapped = file.read(len(ZIP)) == ZIP  # as torch saves since 1.6
        if mapped:
            _check_sums(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong comes as an error too
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}") from None
    except zipfile.BadZipFile as error:
        raise BadInput(f"{path}: damaged or cut off: {one_line(error)}") from None
    except Exception as error:  # of any type, where the bytes are no pickle
        raise BadInput(f"{path}: {_why(error)}") from None


def _check_sums(path: Path) -> None:
    """Compare the checksums of all parts, which torch does not."""
    with zipfile.ZipFile(path) as archive:
        for part in archive.infolist():
            if part.CRC == 0:  # torch.serialization.set_crc32_options(False)
                continue
            with archive.open(part) as content:
                while content.read(1 << 20):
                    pass


def _why(error: Exception) -> str:
    """Without torch's advice, which is to run the code here."""
    text = str(error)
    if "TorchScript" in text:
        return "refused: a TorchScript program, not a checkpoint"
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
