"""Reads and writes safetensors files one tensor at a time.

A file has three parts: the length of the header in 8 bytes, little-endian; the header, which is
JSON padded with spaces to a multiple of 8 bytes; and the tensors without gaps.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import BadInput, CannotWrite, cannot_read, one_line
from .output import Writer

DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    **({"F8_E8M0": torch.float8_e8m0fnu} if hasattr(torch, "float8_e8m0fnu") else {}),
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes by their names in headers, in the order in which the library writes tensors. In this
order every tensor starts at a multiple of its element size."""
METADATA = "__metadata__"
"""The only key of a header that names no tensor."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Spec:
    """The dtype and the shape that a header states for a tensor."""

    dtype: torch.dtype
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def spec(key: str, tensor: Tensor) -> Spec:
    """Return the dtype and the shape that a header would state for ``tensor``.

    Raises:
        CannotWrite: if the format cannot hold such a tensor or such a key.
    """
    _check_key(key)
    if tensor.dtype not in _NAMES or tensor.layout != torch.strided or tensor.device.type != "cpu":
        kind = f"{tensor.dtype}, {tensor.layout}, {tensor.device}"
        raise CannotWrite(f"{key}: a safetensors file cannot hold such a tensor ({kind})")
    return Spec(tensor.dtype, tensor.shape)


def _check_key(key: str) -> None:
    """Refuse the key of the metadata, and keys that UTF-8 cannot encode."""
    if key == METADATA or any("\ud800" <= c <= "\udfff" for c in key):
        raise CannotWrite(f"{key}: a safetensors file cannot have such a key")


@dataclass(frozen=True)
class OpenFile:
    """An open file. A tensor is mapped into memory only when it is asked for."""

    specs: dict[str, Spec]
    metadata: dict[str, str] | None
    tensor: Callable[[str], Tensor]


@contextmanager
def reading(path: Path) -> Iterator[OpenFile]:
    """Open a file.

    Raises:
        BadInput: if the file does not exist, is truncated or corrupt, or has a dtype that is not
            supported.
    """
    try:
        path.open("rb").close()  # Python's own error tells the reason
        opened = safe_open(str(path), framework="pt", device="cpu")
    except OSError as error:
        raise cannot_read(path, error) from None
    except SafetensorError as error:
        raise BadInput(f"{path}: not a safetensors file, or damaged: {one_line(error)}") from None
    with opened as file:
        specs, keys = {}, file.keys()
        for key in keys:
            view = file.get_slice(key)
            if (name := str(view.get_dtype())) not in DTYPES:
                raise BadInput(f"{path}: {key} has the dtype {name}, which is not supported")
            specs[key] = Spec(DTYPES[name], torch.Size(view.get_shape()))
        yield OpenFile(specs, file.metadata(), file.get_tensor)


def write(
    writer: Writer,
    specs: Mapping[str, Spec],
    metadata: Mapping[str, str] | None,
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """Write the file that :func:`safetensors.torch.save_file` would write.

    Args:
        writer: the output.
        specs: the keys of all tensors with their dtypes and shapes.
        metadata: the metadata of the file.
        tensors: yields the keys of ``specs`` with their tensors, in any order. Only one tensor has
            to be in memory at a time.

    Raises:
        CannotWrite: if the format cannot hold such a key.
    """
    header: dict[str, object] = {METADATA: dict(metadata)} if metadata is not None else {}
    starts, end = {}, 0
    for key in specs:
        _check_key(key)
    ranks = {dtype: rank for rank, dtype in enumerate(_NAMES)}
    for key, about in sorted(specs.items(), key=lambda item: (ranks[item[1].dtype], item[0])):
        starts[key], end = end, end + about.nbytes
        header[key] = {
            "dtype": _NAMES[about.dtype],
            "shape": list(about.shape),
            "data_offsets": [starts[key], end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    writer.write(len(text).to_bytes(8, "little") + text)
    for key, tensor in tensors:
        assert spec(key, tensor) == specs[key], f"{key}: not what the header says"
        writer.seek(8 + len(text) + starts.pop(key))
        plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
        if plain.numel():  # ctypes needs no numpy; `plain` keeps the memory alive meanwhile
            memory = ctypes.c_ubyte * (plain.numel() * plain.element_size())
            writer.write(memoryview(memory.from_address(plain.data_ptr())))
    assert not starts, f"not written: {list(starts)}"
