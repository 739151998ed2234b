"""What compute-sanitizer watches: every kind of kernel once, on small weights, checked.

``python -m benchmarks.gpu.sanitized``. Inputs are made and results are checked on the CPU, so that
next to nothing but kernels of ours runs on the device. On its own it is a quick test, and has
Triton compile what a sanitizer would slow down.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

import wnkernel
from wnkernel.functional import weight_norm, weight_norms

from .. import verify
from .raw import backends

SHAPES = (
    ((33, 40), (0, 1, None)),  # short rows; columns that end within a block
    ((6, 5, 3), (0, 1, 2)),  # nothing is a multiple of anything
    ((5, 1031), (0, 1)),  # rows that end within a vector
    ((2, 9001), (0, None)),  # rows longer than a block keeps
    ((64, 3, 256), (1,)),  # rows in runs
    ((384, 8, 128), (2, 1)),  # few columns with many elements: a split reduction
    ((640, 520), (None,)),  # one row with many elements
    ((1, 300, 3), (0, 1, 2)),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEVICE = os.environ.get("WNKERNEL_SANITIZED_DEVICE", "cuda")

Weight = tuple[Tensor, Tensor, int | None]


def weights(dtype: torch.dtype) -> list[Weight]:
    """v, g and dim, on the CPU."""
    random = torch.Generator().manual_seed(0)
    found = []
    for shape, dims in SHAPES:
        for dim in dims:
            v = torch.randn(shape, generator=random).to(dtype)
            norm_shape = () if dim is None else [n if k == dim else 1 for k, n in enumerate(shape)]
            g = torch.rand(norm_shape, generator=random).add_(0.5).to(dtype)
            found.append((v, g, dim))
    return found


def run(chosen: Sequence[Weight], *, together: bool) -> int:
    """Forward and backward on the device, one by one or as a list; how many were checked."""
    dtype = chosen[0][0].dtype
    random = torch.Generator().manual_seed(1)
    grad_ws = [torch.randn(v.shape, generator=random).to(v.dtype) for v, _, _ in chosen]
    vs = [v.to(DEVICE).requires_grad_() for v, _, _ in chosen]
    gs = [g.to(DEVICE).requires_grad_() for _, g, _ in chosen]
    dims = [dim for _, _, dim in chosen]
    if together:
        ws = weight_norms(vs, gs, dims)
    else:
        ws = [weight_norm(*weight) for weight in zip(vs, gs, dims, strict=True)]
    grads = torch.autograd.grad(ws, [*vs, *gs], [grad.to(DEVICE) for grad in grad_ws])
    n = len(chosen)
    for k, ((v, g, dim), grad_w) in enumerate(zip(chosen, grad_ws, strict=True)):
        got = [t.detach().cpu() for t in (ws[k], grads[k], grads[n + k])]
        want = verify.reference(v, g, dim, grad_w)
        title = f"{dtype} {list(v.shape)} dim {dim}, {'list' if together else 'single'}"
        # in float64 the reference sums no better
        verify.check(title, got, want, long_sums=dtype == torch.float64)
    return n


def main() -> None:
    """Everything on every backend with kernels of ours; exits with 1 if a result is wrong."""
    names = backends(torch.empty(1, device=DEVICE))
    if not names:
        sys.exit(f"no backend with kernels of ours runs on {DEVICE}")
    checked = 0
    for name, dtype in itertools.product(names, DTYPES):
        with wnkernel.use_backend(name):
            chosen = weights(dtype)
            checked += run(chosen, together=False)
            checked += run(chosen, together=True)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print(f"{checked} weight norms on {', '.join(names)} are right")


if __name__ == "__main__":
    main()
