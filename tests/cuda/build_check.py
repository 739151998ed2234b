"""A build with CUDA kernels, on a machine that need not have a GPU: does it load, are its operators
registered, do they trace? ``make cuda-build-check`` pipes this into Python where the build is."""

from __future__ import annotations

from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import wnkernel
from wnkernel import native

OPERATORS = ("weight_norm", "forward", "backward")


def check_loaded() -> None:
    assert Path(wnkernel.__file__).is_relative_to(Path.cwd()), wnkernel.__file__
    assert native.loaded(), native.load_error()
    assert native.BUILD_INFO["devices"] == ["cpu", "cuda"], native.BUILD_INFO
    assert native.BUILD_INFO["cuda_architectures"], native.BUILD_INFO


def check_registered() -> None:
    for name in OPERATORS:
        found = torch._C._dispatch_has_kernel_for_dispatch_key(f"wnkernel::{name}", "CUDA")
        assert found, f"no kernel of {name} for CUDA"


def check_traced() -> None:
    ops = torch.ops.wnkernel
    with FakeTensorMode():
        v = torch.empty(6, 4, 3, device="cuda", dtype=torch.bfloat16)
        g = torch.empty(6, 1, 1, device="cuda")
        w, norm = ops.forward([v], [g], [0], [0.0], torch.float32)
        grad_v, grad_g = ops.backward([w], [v], [g], [norm], [0], [0.0], [1], [1])
        alone = ops.weight_norm(v.requires_grad_(), g, 0)
    for t, like, dtype in (
        (w, v, torch.float32), (norm, g, torch.float32), (grad_v, v, v.dtype),
        (grad_g, g, g.dtype), (alone, v, v.dtype),
    ):  # fmt: skip
        assert (t.device.type, t.shape, t.dtype) == ("cuda", like.shape, dtype), t
    assert alone.requires_grad


def check_cpu() -> None:
    """The other half of the module works as ever."""
    v, g = torch.randn(5, 7), torch.rand(5, 1)
    torch.testing.assert_close(wnkernel.functional.weight_norm(v, g), torch._weight_norm(v, g))


if __name__ == "__main__":
    for check in (check_loaded, check_registered, check_traced, check_cpu):
        check()
        print(f"{check.__name__}: ok")
    print(native.BUILD_INFO)
