"""Many Python threads at once in what they share of the compiled module: recycled buffers, slots,
models with a group, and what a launch makes once. ``make sanitize`` runs this under ThreadSanitizer
as well."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import wnkernel
from wnkernel import functional as F
from wnkernel.grouping import slots

from ..threads import Failure, failing_saves, together

THREADS, STEPS = 8, 20
SIZES = [(128, 64, 8), (96, 700), (64, 40, 3), (300, 256)]
"""Three of 64 KiB or more: their results are in recycled buffers."""


def in_each(work: Callable[[int], None]) -> None:
    """``work(k)`` in every thread."""
    together(*(partial(work, k) for k in range(THREADS)))


def weight(k: int) -> tuple[Tensor, Tensor]:
    shape = SIZES[k % len(SIZES)]
    g = torch.rand(shape[0], *(1 for _ in shape[1:])) + 0.5
    return torch.randn(shape).requires_grad_(), g.requires_grad_()


def step(v: Tensor, g: Tensor) -> list[Tensor]:
    w = F.weight_norm(v, g)
    return [w.detach(), *torch.autograd.grad(w.square().sum(), (v, g))]


def test_results_while_others_free_and_release() -> None:
    weights = [weight(k) for k in range(THREADS)]
    expected = [step(v, g) for v, g in weights]

    def work(k: int) -> None:
        for n in range(STEPS):
            kept = step(*weights[k])
            if (n + k) % 5 == 0:
                wnkernel.release_cpu_buffers()
            assert all(map(torch.equal, kept, expected[k]))

    in_each(work)


def test_one_weight_in_all_threads() -> None:
    v, g = weight(0)
    expected = step(v, g)

    def work(k: int) -> None:
        for _ in range(STEPS):
            assert all(map(torch.equal, step(v, g), expected))

    in_each(work)


def test_a_slot_that_all_threads_read() -> None:
    v, g = weight(0)
    with torch.no_grad():
        w = F.weight_norm(v, g)
    (slot,) = slots.slots([w], [v], [g])

    def work(k: int) -> None:
        for _ in range(STEPS):
            assert slot.take(v, g) is w
            assert slot.is_current(v, g)
            assert slot.taken

    in_each(work)


def test_a_fused_model_in_all_threads() -> None:
    layers = [wnkernel.weight_norm(nn.Linear(200, 200)) for _ in range(3)]
    model = nn.Sequential(*layers)
    x = torch.randn(2, 200)
    expected = model(x).detach()
    wnkernel.fuse(model)

    def work(k: int) -> None:
        for _ in range(STEPS):
            with torch.set_grad_enabled(k % 2 == 0):
                assert torch.equal(model(x), expected)

    in_each(work)


def test_a_thread_ends_after_a_backward_that_failed() -> None:
    """What it left undone holds nodes until the thread's last objects are gone."""
    layers = [wnkernel.weight_norm(nn.Linear(5, 5)) for _ in range(3)]

    def forward() -> Tensor:
        return torch.cat([layer(torch.ones(2, 5)) for layer in layers])

    def work() -> None:
        forward().sum().backward()
        for _ in range(5):
            with failing_saves():
                y = forward()
            with pytest.raises(Failure):
                y.sum().backward()

    for _ in range(10):
        together(work)
    forward().sum().backward()
