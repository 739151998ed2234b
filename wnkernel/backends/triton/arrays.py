"""What kernels read and write: inputs in an order that a plan can describe."""

from __future__ import annotations

import torch
from torch import Tensor

from ...problem import is_dense
from .launch_table import VECTOR_BYTES


def dense(name: str, t: Tensor) -> Tensor:
    """t itself where it fills its memory without gaps or repeats, in whatever order; else a copy.

    Raises:
        RuntimeError: t has no memory.
    """
    _check_memory(name, t)
    t = t.resolve_neg()  # a view that negates when it is read
    return t if t.is_contiguous() or is_dense(t) else t.contiguous()


def ordered_like(name: str, t: Tensor, v: Tensor) -> Tensor:
    """t in the memory order of a dense v: itself, or one copy.

    Raises:
        RuntimeError: t has no memory.
    """
    _check_memory(name, t)
    same_order = t.stride() == v.stride() or (t.is_contiguous() and v.is_contiguous())
    return t if same_order and not t.is_neg() else torch.empty_like(v, dtype=t.dtype).copy_(t)


def _check_memory(name: str, t: Tensor) -> None:
    """FSDP takes the memory of a parameter away without telling those who hold it."""
    if t.untyped_storage().nbytes() == 0 and t.numel() > 0:
        raise RuntimeError(
            f"{name}: expected a tensor with memory, got one of shape {list(t.shape)} whose "
            "storage was freed"
        )


def vector_of(v: Tensor, *like_v: Tensor) -> int:
    """Elements of v in the widest access to all of them at the same offsets; 1 for none.

    Other dtypes of the others change nothing: a gradient in the dtype of autocast gives the bits
    that it gives after a cast.
    """
    if any(t.data_ptr() % VECTOR_BYTES for t in (v, *like_v)):
        return 1
    return VECTOR_BYTES // v.element_size()
