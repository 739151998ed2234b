"""Hashes of results: ``python -m tests.bits > before.txt``, change the kernels, compare.

A line for each weight, dtypes and instruction set that this machine can run; values and gradients
of every dim, with rows that leave the float range and a row of zeros. The bits of one build are
those of any number of threads; other compilers may fuse other products.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from wnkernel import info

SHAPES = (
    (1, 16, 7), (64,), (32, 1, 7), (7, 5, 3), (16, 32, 3), (33, 65), (128, 1, 15), (8, 1024, 1),
    (1024, 8, 1), (3, 257), (17, 300), (5, 767), (31, 768), (6, 1031), (96, 96, 3), (40, 2048),
    (128, 64, 3), (9, 4097), (3, 8192), (5, 8193), (4, 9000), (130, 384), (2, 65536), (3, 65537),
    (1, 70001), (256, 8, 41), (48, 100, 5), (512, 128, 3), (64, 40, 3, 3), (19, 48, 128),
)  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MIXED = ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32))
SETS = ("sse2", "avx2", "avx512") if platform.machine() == "x86_64" else ("neon",)
"""The baseline first."""


def tensors(
    shape: tuple[int, ...], dim: int, v_type: torch.dtype, w_type: torch.dtype
) -> list[Tensor]:
    """v, g and grad_w; the first row of a dim with several is zero, the second one huge."""
    random = torch.Generator().manual_seed(0)
    v = torch.randn(shape, generator=random)
    if dim >= 0 and shape[dim] > 4:
        v.select(dim, 0).zero_()
        v.select(dim, 1).mul_(2.0**100 if v_type != torch.float16 else 2.0**12)
        v.select(dim, 2).mul_(2.0**-120 if v_type != torch.float16 else 2.0**-16)
    g_shape = [n if k == dim else 1 for k, n in enumerate(shape)] if dim >= 0 else []
    g = torch.rand(g_shape, generator=random) + 0.5
    grad_w = torch.randn(shape, generator=random)
    return [v.to(v_type), g.to(v_type), grad_w.to(w_type)]


def hashes(
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    pairs: Sequence[tuple[torch.dtype, torch.dtype]] = (*((t, t) for t in DTYPES), *MIXED),
) -> Iterator[str]:
    """Lines of this process's instruction set."""
    ops = torch.ops.wnkernel
    name = info()["compiled"]["cpu_instruction_set"]
    for shape, (v_type, w_type) in itertools.product(shapes, pairs):
        for dim in (*range(len(shape)), -1):
            v, g, grad_w = tensors(shape, dim, v_type, w_type)
            dims, eps, yes = [dim], [1e-12], [1]
            w, norm = ops.forward([v], [g], dims, eps, w_type)
            grad_v, grad_g = ops.backward([grad_w], [v], [g], [norm], dims, eps, yes, yes)
            digest = hashlib.sha256()
            for t in (w, norm, grad_v, grad_g):
                digest.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
            text = "x".join(map(str, shape))
            yield f"{name} {text} {dim} {v_type} {w_type} {digest.hexdigest()[:16]}"


def main() -> None:
    """A process for every instruction set."""
    for isa in SETS:
        environment = os.environ | {"WNKERNEL_CPU_ISA": isa}
        subprocess.run([sys.executable, "-m", "tests.bits", "one"], env=environment, check=True)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif info()["compiled"]["cpu_instruction_set"] == os.environ["WNKERNEL_CPU_ISA"]:
        print(*hashes(), sep="\n")  # a machine without that set has taken another
