"""The weights that ``wnkernel bench`` times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..problem import FLOAT_DTYPES, WHOLE_TENSOR, canonical_dim
from . import sources
from .errors import NothingToConvert, WrongUsage, one_line

DEFAULT_SHAPES, DEFAULT_DIMS = ("64x64x3", "512x512x3", "768x48x128"), ("0", "0", "2")
"""The shapes and dims of the weights that are timed by default."""


@dataclass(frozen=True)
class Case:
    """A weight to time, and the number of layers that have such a weight."""

    shape: tuple[int, ...]
    dim: int
    """The canonical dim, as in :class:`~wnkernel.problem.Problem`."""
    dtype: torch.dtype
    layers: int = 1

    def __str__(self) -> str:
        return f"{shape_text(self.shape)} dim {dim_text(self.dim)} {dtype_text(self.dtype)}"


def of_shapes(shapes: Sequence[str], dims: Sequence[str], dtype: str | None) -> list[Case]:
    """Return the weights that the options --shape, --dim and --dtype name.

    Args:
        shapes: texts such as ``512x512x3``.
        dims: one text for all shapes, or one for each shape: ``none`` or a number.
        dtype: the name of a dtype; float32 if None.

    Raises:
        WrongUsage: if an option is malformed or does not fit the others.
    """
    if len(dims) == 1:
        dims = [dims[0]] * len(shapes)
    if len(dims) != len(shapes):
        raise WrongUsage(f"--dim: expected one, or {len(shapes)} as of --shape, got {len(dims)}")
    chosen = _dtype(dtype) or torch.float32
    sizes = [_shape(text) for text in shapes]
    return [Case(s, _dim(text, s), chosen) for s, text in zip(sizes, dims, strict=True)]


def of_checkpoint(path: Path, dtype: str | None) -> list[Case]:
    """Return the weight norms of a checkpoint, with one case for all of the same shape, dim and
    dtype.

    Raises:
        WrongUsage: if the dtype is unknown.
        BadInput: if the file cannot be read.
        NothingToConvert: if the checkpoint has no weight norm.
    """
    chosen = _dtype(dtype)
    counts = Counter(
        (tuple(weight.shape), weight.dim, chosen or its)
        for weight, its in sources.normed_weights(path)
        if weight.shape.numel()
    )
    if not counts:
        raise NothingToConvert(f"{path}: has no weight norm")
    return [Case(*kind, layers=count) for kind, count in counts.items()]


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.lower().split("x")
    if not all(size.isdecimal() and len(size) < 19 and int(size) > 0 for size in sizes):
        raise WrongUsage(f"--shape: expected sizes as in 512x512x3, got {text!r}")
    return tuple(map(int, sizes))


def _dim(text: str, shape: tuple[int, ...]) -> int:
    try:
        return canonical_dim(None if text.lower() == "none" else int(text), len(shape))
    except ValueError:
        raise WrongUsage(
            f"--dim: expected none or a dimension of {shape_text(shape)}, got {text!r}"
        ) from None


def _dtype(text: str | None) -> torch.dtype | None:
    known = {dtype_text(dtype): dtype for dtype in FLOAT_DTYPES}
    if text is not None and text not in known:
        raise WrongUsage(f"--dtype: expected one of {', '.join(known)}, got {text!r}")
    return known.get(text)


def device_of(text: str) -> torch.device:
    """Return a device that torch can use; a CUDA device becomes the current one.

    Raises:
        WrongUsage: if torch cannot compute on the device.
    """
    try:
        device = torch.empty(1, device=text).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise WrongUsage(f"--device: {text!r} cannot be used: {one_line(error)}") from None
    if device.type == "meta":
        raise WrongUsage("--device: meta computes nothing")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def shape_text(shape: Iterable[int]) -> str:
    """Write a shape such as (512, 512, 3) as ``512x512x3``."""
    return "x".join(map(str, shape))


def dim_text(dim: int | None) -> str:
    """Write a dim as the option --dim takes it."""
    return "none" if dim in (None, WHOLE_TENSOR) else str(dim)


def dtype_text(dtype: torch.dtype) -> str:
    """Write a dtype such as torch.float32 as ``float32``."""
    return str(dtype).removeprefix("torch.")
