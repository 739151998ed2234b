"""Triton's interpreter, with a shortcut that halves the time of the tests."""

from __future__ import annotations

import os

import torch


def use_interpreter() -> None:
    """Have Triton kernels interpreted on the CPU where there is no GPU. Call before Triton is
    imported."""
    if torch.cuda.is_available():
        return
    os.environ.setdefault("TRITON_INTERPRET", "1")
    try:
        from triton.runtime import interpreter
    except ImportError:
        return

    # For every call of a device function the interpreter replaces all of triton.language, which
    # takes 2 ms. Once for each launch and module is enough.
    replaced: set[int] = set()
    launch = interpreter.GridExecutor.__call__

    def launch_anew(self, *args, **kwargs):
        replaced.clear()
        return launch(self, *args, **kwargs)

    def call(self, *args, **kwargs):
        if (module := id(self.fn.__globals__)) not in replaced:
            interpreter._patch_lang(self.fn)
            replaced.add(module)
        return self.rewrite()(*args, **kwargs)

    # A bound of a loop is an array of one element to it, which NumPy 2.5 takes for no integer.
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor, *scope):
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    # Spread over a block, a comparison of scalars has their type and not its own, and Triton 3.9
    # takes no such mask.
    create_splat = interpreter.InterpreterBuilder.create_splat

    def create_typed_splat(self, type_, value):
        data = create_splat(self, type_, value).data
        return interpreter.TensorHandle(
            data.astype(interpreter._get_np_dtype(type_.scalar)), type_.scalar
        )

    interpreter.InterpreterBuilder.create_splat = create_typed_splat
    interpreter._patch_lang_tensor = patch_tensor_and_index
    interpreter.GridExecutor.__call__ = launch_anew
    interpreter.InterpretedFunction.__call__ = call
