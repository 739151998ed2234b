"""``python -m tests.fuzz.limits``: too little memory in fuse, forward and backward.

Prints how often each of them failed. Whatever failed works when there is memory again, with the
bits that it always had.
"""

from __future__ import annotations

import json
from collections import Counter

import torch
from torch import nn

import wnkernel
from wnkernel.cli.limits import memory_limit

from ..groups import originals

STEP = 3 << 18
"""Bytes by which the limits differ."""
LIMITS = 20
ERRORS = (MemoryError, RuntimeError)


def model_of_4_mib() -> nn.Module:
    """Weights of 1 MiB, some with a norm along each dim."""
    return nn.Sequential(
        *(wnkernel.weight_norm(nn.Linear(512, 512, bias=False), dim=k % 2) for k in range(4))
    )


def main() -> None:
    torch.set_num_threads(1)
    model, x = model_of_4_mib(), torch.ones(1, 512)
    want = torch.autograd.grad(model(x).sum(), originals(model))
    group = wnkernel.fuse(model)
    failed: Counter[str] = Counter()

    def fuse() -> None:
        nonlocal group
        group.remove()
        group = wnkernel.fuse(model)

    def forward() -> torch.Tensor:
        return model(x)

    def backward() -> object:
        return torch.autograd.grad(y.sum(), originals(model))

    kept = []  # or their buffers would serve what comes next, without new memory
    for k in range(LIMITS):
        for name, action in (("fuse", fuse), ("forward", forward), ("backward", backward)):
            kept.append(y := model(x))
            try:
                with memory_limit(k * STEP):
                    kept.append(action())
            except ERRORS as error:
                failed[name] += 1
                if not (isinstance(error, MemoryError) or "memory" in str(error)):
                    raise
            if not model._forward_hooks:
                group = wnkernel.fuse(model)
            kept.append(got := torch.autograd.grad(model(x).sum(), originals(model)))
            assert all(map(torch.equal, got, want)), (name, k)
            assert group.memory()["slots"] == 0
    print(json.dumps(failed))


if __name__ == "__main__":
    main()
