"""Whether an exporter is at work. Its program leaves this process for others, which have no
operators of ours, so the plain formula is traced then.

``torch.compile`` stays in the process and keeps the operators. Until torch 2.11 Dynamo takes
``torch.compiler.is_exporting()`` for true in every program that it traces: it is not asked there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.compiler import assume_constant_result, is_dynamo_compiling

_flag = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
"""Before torch 2.7 nothing but torch.export sets the flag behind ``is_compiling``."""


def is_exporting() -> bool:
    """Whether torch.export traces this call, with Dynamo (``strict=True``) or without. The flag is
    the process's: on other threads nothing is being traced."""
    if is_dynamo_compiling():
        return _dynamo_exports()
    return _flag() and torch._C._len_torch_dispatch_stack() > 0


@assume_constant_result
def _dynamo_exports() -> bool:
    """Before torch 2.8 the flag is down while Dynamo traces."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return _flag() or InstructionTranslator.current_tx().export


def is_torchscript_trace() -> bool:
    """Whether the TorchScript tracer follows this call: ``torch.jit.trace``, and the exporters that
    begin with it."""
    return torch._C._is_tracing()


def is_torchscript_onnx() -> bool:
    """Whether the tracer follows this call for ``torch.onnx.export(dynamo=False)``. What that can
    compute beforehand, up to opset 17, has ReduceL2 in it and not ReduceSum."""
    onnx = sys.modules.get("torch.onnx")
    return onnx is not None and onnx.is_in_onnx_export()


@contextmanager
def tracer_paused() -> Iterator[None]:
    """In the block the TorchScript tracer sees nothing. It would record the shapes that arguments
    are checked by, and warn of every comparison."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)
