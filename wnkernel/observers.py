"""Observers of tensors: compilers, exporters, tracers, function transforms, dispatch modes,
DTensors and sharded modules.

Other files ask here whether an observer is at work, and ask torch itself only whether Dynamo or
another compiler is tracing. Code that is observed must consist of operators that the observer can
see, and its results must not be kept for a later call. Kernels that take addresses run only where
no observer is left.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.compiler import assume_constant_result, is_dynamo_compiling
from torch.nn.parameter import Parameter
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

PLAIN = (Tensor, Parameter)
"""Types without ``__torch_function__`` and ``__torch_dispatch__``. This is a tuple because torch
2.6 and 2.7 cannot trace ``in`` of a frozenset."""

_PLAIN = frozenset(PLAIN)


# These functions tell who follows the operators of this thread.


def is_followed() -> bool:
    """Whether a function transform, a ``__torch_dispatch__`` mode (make_fx, fake tensors) or the
    TorchScript tracer follows every operator of this thread."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def are_calls_watched() -> bool:
    """Whether a ``__torch_function__`` mode wants to see every call. The mode of
    ``torch.set_default_device`` does not count, because it changes only functions that make
    tensors."""
    return torch._C._len_torch_function_stack() > 0 and any(
        type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()
    )


def is_forward_ad() -> bool:
    """Whether a block of forward-mode AD is open, in any thread."""
    return forward_ad._current_level >= 0


def is_transformed(tensors: Iterable[Tensor]) -> bool:
    """Whether a function transform is at work, or one of the tensors has a tangent of forward-mode
    AD. Custom autograd nodes work with neither."""
    return torch._C._are_functorch_transforms_active() or (
        is_forward_ad() and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)
    )


# These functions tell what tensors are.


def are_plain(tensors: Iterable[Tensor]) -> bool:
    """Whether all tensors are of plain types and nobody follows the operators of this thread."""
    return not is_followed() and _PLAIN.issuperset(map(type, tensors))


def have_addresses(tensors: Sequence[Tensor]) -> bool:
    """Whether kernels may use the addresses of tensors: the tensors have memory, and no mode and no
    tensor subclass (make_fx, fake tensors) needs to see operators."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and all(map(torch._C._has_storage, tensors))
        and (_PLAIN.issuperset(map(type, tensors)) or not any(map(_dispatches, tensors)))
    )


def _dispatches(t: Tensor) -> bool:
    return torch._C._dispatch_keys(t).has(torch._C.DispatchKey.Python)


def are_untouched(tensors: Sequence[Tensor]) -> bool:
    """Whether a custom autograd node and kernels can take tensors as they are."""
    return have_addresses(tensors) and not is_torchscript_trace() and not is_transformed(tensors)


def has_values(t: Tensor) -> bool:
    """Whether a tensor has values, which meta tensors and fake tensors do not have."""
    return not (t.is_meta or isinstance(t, FakeTensor))


def has_memory(t: Tensor) -> bool:
    """Whether a tensor has its memory. Sharded modules free it between forwards."""
    return t.numel() == 0 or t.untyped_storage().nbytes() > 0


def is_distributed(t: Tensor) -> bool:
    """Whether ``t`` is a DTensor, which has rules for torch's own operators only."""
    if type(t) in PLAIN:
        return False
    for name in ("torch.distributed.tensor", "torch.distributed._tensor"):  # before torch 2.5
        kind = getattr(sys.modules.get(name), "DTensor", None)  # imported if a DTensor exists
        if kind is not None:
            return isinstance(t, kind)
    return False


def sharding_modules() -> tuple[type[nn.Module], ...]:
    """The classes of modules that shard their parameters; none if torch.distributed is not
    running."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return ()
    found = (
        getattr(sys.modules.get(module), name, None)
        for module, name in (
            ("torch.distributed.fsdp", "FSDPModule"),
            ("torch.distributed._composable.fsdp", "FSDPModule"),  # before torch 2.6
            ("torch.distributed.fsdp", "FullyShardedDataParallel"),
        )
    )
    return tuple(kind for kind in found if kind is not None)


# Exported programs run in processes without the operators of this package, so exporters trace the
# plain formula. Programs of torch.compile stay in this process and keep the operators.

_export_flag = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
"""The function that tells whether torch.export is at work. Before torch 2.7 this is
``is_compiling``, whose flag only torch.export sets there. Until torch 2.11 Dynamo takes a traced
call of ``torch.compiler.is_exporting()`` for true in every program, so traced code does not call
this."""


def is_exporting() -> bool:
    """Whether torch.export traces this call, with Dynamo (``strict=True``) or without. The flag
    holds for the whole process, so this also looks whether anything is traced on this thread."""
    if is_dynamo_compiling():
        return _dynamo_exports()
    return _export_flag() and torch._C._len_torch_dispatch_stack() > 0


@assume_constant_result
def _dynamo_exports() -> bool:
    """Whether Dynamo traces for torch.export. Before torch 2.8 the flag is not set while it
    traces."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return _export_flag() or InstructionTranslator.current_tx().export


def is_torchscript_trace() -> bool:
    """Whether the TorchScript tracer follows this call: ``torch.jit.trace``, and the exporters that
    begin with it."""
    return torch._C._is_tracing()


def is_torchscript_onnx() -> bool:
    """Whether the tracer follows this call for ``torch.onnx.export(dynamo=False)``. Up to opset 17
    that exporter can compute ReduceL2 of constants beforehand, but not ReduceSum."""
    onnx = sys.modules.get("torch.onnx")
    return onnx is not None and onnx.is_in_onnx_export()


@contextmanager
def tracer_paused() -> Iterator[None]:
    """Hide the block from the TorchScript tracer, which would record the shapes that the checks
    read and warn of every comparison."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]  # no stub has it
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]  # no stub has it
