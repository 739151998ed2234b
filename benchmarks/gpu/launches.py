"""Eight launches of the CUDA kernels, for a profiler: ``python -m benchmarks.gpu.launches``.

Rows, a strip that is split (two launches a direction) and a model as a list, each forward and
backward, in float32.
"""

from __future__ import annotations

import torch

import wnkernel
from wnkernel.functional import weight_norms

from ..shapes import LayerCase, weight_list
from .raw import inputs

LAUNCHES = 8

LISTS = (
    [LayerCase((4096, 4096), 0, "", "Linear")],
    [LayerCase((1024, 64, 128), 2, "", "Conv1d")],
    weight_list("HiFi-GAN-V1"),
)


def main(device: str = "cuda") -> None:
    """Runs them once."""
    with wnkernel.use_backend("cuda" if device == "cuda" else wnkernel.backends.AUTO):
        for cases in LISTS:
            sets = [inputs(c, torch.float32, torch.device(device), k) for k, c in enumerate(cases)]
            vs, gs = ([t.requires_grad_() for t in (getattr(s, x) for s in sets)] for x in "vg")
            ws = weight_norms(vs, gs, [c.dim for c in cases])
            torch.autograd.grad(ws, [*vs, *gs], [s.grad_w for s in sets])
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{sum(map(len, LISTS))} weight norms, forward and backward")


if __name__ == "__main__":
    main()
