"""``python -m tests.fuzz.soak 100000``: training steps in one process, whose memory has to stay."""

from __future__ import annotations

import gc
import resource
import sys
import threading
from typing import NamedTuple

import torch
from torch import nn

import wnkernel

from ..groups import Net, originals

ALLOWED = 16 << 20
"""Bytes that the process may grow by after its first tenth: what an allocator keeps in pieces, for
each thread too. In 100,000 steps, 200 bytes a step come to more."""


class Held(NamedTuple):
    """What a process holds."""

    rss: int
    tensors: int
    buffers: int


def held(model: nn.Module) -> Held:
    """What is held beside the slots of the version mode."""
    wnkernel.WeightNormGroup.of(model).refresh()
    gc.collect()
    with open("/proc/self/statm") as file:
        rss = int(file.read().split()[1]) * resource.getpagesize()
    tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    return Held(rss, tensors, wnkernel.cpu_buffers().get("used_bytes", 0))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A training step, and a forward without gradients."""
    model().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        model()


def failing(model: nn.Module) -> None:
    """A forward that ends in an exception."""
    handle = model.back.register_forward_hook(lambda *_: 1 / 0)
    try:
        model()
    except ZeroDivisionError:
        handle.remove()


def run(steps: int) -> tuple[Held, Held]:
    """What is held after a tenth of the steps, and at their end."""
    torch.set_num_threads(1)  # those that wait for each other would take most of the time
    model = Net()
    wnkernel.fuse(model)
    optimizer = torch.optim.SGD(originals(model), lr=1e-3, momentum=0.9)
    for k in range(steps):
        step(model, optimizer)
        if k % 20 == 0:
            failing(model)
            thread = threading.Thread(target=step, args=(model, optimizer))
            thread.start()
            thread.join()
        if k % 50 == 0:
            wnkernel.WeightNormGroup.of(model).remove()
            wnkernel.fuse(model, reuse="version" if k % 100 else "forward")
        if k == steps // 10:
            begin = held(model)
    return begin, held(model)


if __name__ == "__main__":
    begin, end = run(int(sys.argv[1]))
    print(begin, end, sep="\n")
    grown = end.rss - begin.rss > ALLOWED or end[1:] != begin[1:]
    sys.exit("the process has grown" if grown else 0)
