"""The only loader of the compiled module ``wnkernel._C``, and the fakes of its operators.

Loading never raises: without the module, or with one built for another torch, the package runs on
its other backends and :func:`load_error` says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .problem import accumulation_dtype, canonical_dim, norm_shape

def _load() -> tuple[ModuleType | None, str]:
    """The compiled module, or None and one line on why it is not there."""
    try:
        from ._build_info import TORCH_VERSION
    except ImportError:
        return None, "wnkernel._C is not built (a pure-Python install)"
    if _minor(TORCH_VERSION) != _minor(torch.__version__):
        here = torch.__version__
        return None, f"wnkernel._C was built for torch {TORCH_VERSION}, this is torch {here}"
    try:
        from . import _C
    except ImportError as error:
        return None, f"wnkernel._C cannot be loaded: {error}"
    return _C, ""


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


_C, _LOAD_ERROR = _load()


def loaded() -> bool:
    """Whether ``wnkernel._C`` is there and was loaded."""
    return _C is not None


BUILD_INFO: dict[str, Any] = {} if _C is None else _C.build_info()
"""What ``wnkernel._C`` was built with; empty without it."""


native_weight_norm = None if _C is None else _C.weight_norm
"""``weight_norm(v, g, dim, eps, out_dtype)`` in C++: checks, autograd and kernel behind one call.
The shortest way to torch.ops.wnkernel.weight_norm, for code that is not being traced."""


def load_error() -> str:
    """One line on why ``wnkernel._C`` is not loaded; empty when it is."""
    return _LOAD_ERROR


def _fake_w(v: Tensor, out_dtype: torch.dtype | None) -> Tensor:
    return torch.empty_like(v, dtype=out_dtype or v.dtype)


def _fake_norm(v: Tensor, dim: int) -> Tensor:
    shape = norm_shape(v.shape, canonical_dim(dim, v.ndim))
    return v.new_empty(shape, dtype=accumulation_dtype(v.dtype))


if _C is not None:

    @torch.library.register_fake("wnkernel::weight_norm")
    def _(
        v: Tensor, g: Tensor, dim: int, eps: float = 0.0, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        return _fake_w(v, out_dtype)

    @torch.library.register_fake("wnkernel::forward")
    def _(
        v: Sequence[Tensor],
        g: Sequence[Tensor],
        dim: Sequence[int],
        eps: Sequence[float],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        return (
            [_fake_w(x, out_dtype) for x in v],
            [_fake_norm(x, d) for x, d in zip(v, dim, strict=True)],
        )

    @torch.library.register_fake("wnkernel::backward")
    def _(
        grad_w: Sequence[Tensor],
        v: Sequence[Tensor],
        g: Sequence[Tensor],
        norm: Sequence[Tensor],
        dim: Sequence[int],
        eps: Sequence[float],
        need_v: Sequence[int],
        need_g: Sequence[int],
    ) -> tuple[list[Tensor], list[Tensor]]:
        return (
            [torch.empty_like(x) for x, need in zip(v, need_v, strict=True) if need],
            [torch.empty_like(x) for x, need in zip(g, need_g, strict=True) if need],
        )
