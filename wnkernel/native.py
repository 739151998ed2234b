"""The only loader of the compiled module ``wnkernel._C``, and the fakes of its operators.

Loading raises an error only for an invalid environment variable. Without the module, or with a
module built for another torch, the package runs on its other backends, and :func:`load_error` gives
the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _versions, compiled_graphs, installation
from .problem import Problem, check, check_backward, check_forward, is_dense


def _load() -> tuple[Any, dict[str, Any], str]:
    """Load the compiled module. Returns the module (or None), what it was built with, and one line
    on why it is not loaded."""
    if reason := _versions.untried():
        return None, {}, reason
    try:
        from ._build_info import CUDA_ARCHITECTURES, CUDA_VERSION, TORCH_VERSION
    except ImportError:
        return None, {}, installation.why_not_built()
    if _versions.release(TORCH_VERSION) != _versions.release(torch.__version__):
        here = torch.__version__
        reason = f"wnkernel._C was built for torch {TORCH_VERSION}, this is torch {here}"
        installation.tell(reason)
        return None, {}, reason
    try:
        from . import _C  # type: ignore[attr-defined]  # it is compiled
    except ImportError as error:
        return None, {}, f"wnkernel._C cannot be loaded: {error}"
    info = _C.build_info()
    _C.cpu_buffers()  # it reads an environment variable; an invalid one raises here
    if CUDA_VERSION:
        info |= {"cuda": CUDA_VERSION, "cuda_architectures": CUDA_ARCHITECTURES}
    return _C, info, ""


_C, BUILD_INFO, _LOAD_ERROR = _load()
"""BUILD_INFO: what ``wnkernel._C`` was built with; empty without it."""

MACHINE: dict[str, Any] = {} if _C is None else _C.machine()
"""The sizes in bytes of this machine's caches and pages, as the CPU kernels see them, and the
source of each; empty without ``wnkernel._C``."""


def loaded() -> bool:
    """Whether ``wnkernel._C`` is loaded."""
    return _C is not None


def has_no_kernels_on(device: str) -> bool:
    """Whether ``wnkernel._C`` is loaded but has no kernels for a type of device."""
    return loaded() and device not in BUILD_INFO["devices"]


weight_norm = None if _C is None else _C.weight_norm
"""``weight_norm(v, g, dim, eps, out_dtype)`` in C++: checks, autograd and kernel behind one call.
It is the fastest way to torch.ops.wnkernel.weight_norm for code that is not being traced."""

weight_norms = None if _C is None else _C.weight_norms
"""``weight_norms(vs, gs, dims, eps, out_dtype)`` in C++, the same for
torch.ops.wnkernel.forward."""

slots = None if _C is None else _C.slots
launch_mode = None if _C is None else _C.launch_mode
"""The versions in C++ of what wnkernel/grouping/slots.py defines under these names."""


def cpu_buffers() -> dict[str, int]:
    """The memory of results on the CPU, in bytes (docs/memory.md).

    Results of 64 KiB and more live in buffers. A buffer serves the next result of the same size as
    soon as no tensor uses it.

    Returns:
        ``used_bytes`` in tensors and idle ``held_bytes``; an empty dict without ``wnkernel._C``.
    """
    return {} if _C is None else _C.cpu_buffers()


def release_cpu_buffers() -> None:
    """Give the idle buffers of :func:`cpu_buffers` back to the system."""
    if _C is not None:
        _C.release_cpu_buffers()


def cuda_reason(device: torch.device) -> str:
    """Why ``wnkernel._C`` has no code for a CUDA device; empty if it has. Call this only if the
    module is :func:`loaded`."""
    return _C.cuda_reason(device.index)


def load_error() -> str:
    """One line on why ``wnkernel._C`` is not loaded; empty when it is."""
    return _LOAD_ERROR


def can_be_built() -> bool:
    """Whether ``wnkernel._C`` is not loaded, and another installation might have it."""
    return _C is None and not _versions.untried()


def _fake_like(v: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor like the one that a kernel allocates for v: in v's memory order if v is
    dense, contiguous if v has gaps."""
    order = torch.preserve_format if is_dense(v) else torch.contiguous_format
    return torch.empty_like(v, dtype=dtype, memory_format=order)


def _fake_forward(p: Problem) -> tuple[Tensor, Tensor]:
    norm = p.g.new_empty(p.g.shape, dtype=p.acc_dtype)
    return _fake_like(p.v, p.out_dtype), norm


if _C is not None:

    @torch.library.register_fake("wnkernel::forward_one")
    def _fake_forward_one(
        v: Tensor,
        g: Tensor,
        dim: int,
        eps: float = 0.0,
        out_dtype: torch.dtype | None = None,
        bucket: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        compiled_graphs.install()
        return _fake_forward(check(v, g, dim, eps, out_dtype, may_add=True))

    @torch.library.register_fake("wnkernel::weight_norm")
    def _(*arguments: Any) -> Tensor:
        return _fake_forward_one(*arguments)[0]

    @torch.library.register_fake("wnkernel::backward_one")
    def _(
        grad_w: Tensor,
        v: Tensor,
        g: Tensor,
        norm: Tensor,
        dim: int,
        eps: float,
        need_v: bool,
        need_g: bool,
        bucket: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        check_backward([grad_w], [v], [g], [norm], [dim], [eps], [need_v], [need_g])
        return (
            _fake_like(v, v.dtype) if need_v else v.new_empty(0),
            torch.empty_like(g) if need_g else g.new_empty(0),
        )

    @torch.library.register_fake("wnkernel::forward")
    def _(
        v: Sequence[Tensor],
        g: Sequence[Tensor],
        dim: Sequence[int],
        eps: Sequence[float],
        out_dtype: torch.dtype | None = None,
    ) -> list[Tensor]:
        problems = check_forward(v, g, dim, eps, out_dtype, may_add=True)
        results = [_fake_forward(p) for p in problems]
        return [w for w, _ in results] + [norm for _, norm in results]

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
    ) -> list[Tensor]:
        check_backward(grad_w, v, g, norm, dim, eps, need_v, need_g)
        grad_v = [_fake_like(x, x.dtype) for x, need in zip(v, need_v, strict=True) if need]
        return grad_v + [torch.empty_like(x) for x, need in zip(g, need_g, strict=True) if need]
