"""The current stream and the device of the weights, whichever GPU is the current one."""

from __future__ import annotations

import copy

import pytest
import torch

import wnkernel

from ..groups import Net, assert_same
from .on_gpus import Weight, assert_same_bits, change, results, weights

CYCLES = 100_000_000
"""Of a GPU that waits: some 50 ms, in which the host is done with all that it queues."""

both_ways = pytest.mark.parametrize("together", [False, True], ids=["singly", "listed"])


def copies(chosen: list[Weight]) -> list[Weight]:
    return [
        Weight(w.v.detach().clone().requires_grad_(), w.g.detach().clone().requires_grad_(),
               w.dim, w.grad_w.clone())
        for w in chosen
    ]  # fmt: skip


@both_ways
def test_work_waits_for_its_own_stream(gpu_backend, together):
    """Weights that change on a stream are read when they have."""
    chosen = weights()
    results(chosen, together=together)  # compiles
    streams = [torch.cuda.Stream() for _ in range(2)]
    for stream in (*streams, *streams):
        new = copies(chosen)
        change(new)
        want = results(new, together=together)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(CYCLES)
            with torch.no_grad():
                for old, other in zip(chosen, new, strict=True):
                    for name in ("v", "g", "grad_w"):
                        getattr(old, name).copy_(getattr(other, name))
            got = results(chosen, together=together)
        stream.synchronize()
        assert_same_bits(got, want)


@both_ways
def test_a_backward_that_is_called_from_another_stream(gpu_backend, together):
    """autograd runs it on the stream of the forward, and has the caller's wait for it."""
    chosen = weights()
    want = results(chosen, together=together)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)
        forward = wnkernel.functional.weight_norms
        singly = wnkernel.functional.weight_norm
        ws = (
            forward([w.v for w in chosen], [w.g for w in chosen], [w.dim for w in chosen])
            if together
            else [singly(w.v, w.g, w.dim) for w in chosen]
        )
    inputs = [*(w.v for w in chosen), *(w.g for w in chosen)]
    grads = torch.autograd.grad(ws, inputs, [w.grad_w for w in chosen])
    assert_same_bits(grads, want[len(chosen) :])


@pytest.fixture
def second() -> torch.device:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return torch.device("cuda", 1)


@both_ways
def test_weights_on_a_gpu_that_is_not_the_current_one(gpu_backend, second, together):
    with second:
        chosen = weights()
    with torch.cuda.device(second):
        want = results(chosen, together=together)
    assert torch.cuda.current_device() == 0
    got = results(chosen, together=together)
    assert torch.cuda.current_device() == 0
    assert {t.device for t in got} == {second}
    assert_same_bits(got, want)


def test_a_fused_model_on_a_gpu_that_is_not_the_current_one(gpu_backend, second):
    with second:
        model = Net()
        twin = copy.deepcopy(model)
        wnkernel.fuse(model)
        for _ in range(2):
            assert_same(model(), twin())
            for module in (model, twin):
                module().sum().backward()
        assert torch.cuda.current_device() == 0
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
