"""What a group holds, for how long, and that memory which somebody still sees is left alone."""

from __future__ import annotations

import gc
import io
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import wnkernel

from ..groups import LAYERS, Net, assert_same, both_modes, gradients, originals, twins, weights
from ..processes import PATIENCE_S

LARGE = 2
"""How many weights of :class:`Large` live in recycled memory."""


class Large(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            wnkernel.weight_norm(nn.Linear(256, 320)),
            nn.Tanh(),
            wnkernel.weight_norm(nn.Linear(320, 256), dim=1),
            nn.Tanh(),
            wnkernel.weight_norm(nn.Linear(256, 3), dim=None),
        )


X = torch.linspace(-1, 1, 2 * 256).view(2, 256)


@contextmanager
def without_gc() -> Iterator[None]:
    """What goes now goes because nobody refers to it."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def used() -> int:
    return wnkernel.cpu_buffers()["used_bytes"]


def change(model: nn.Module) -> None:
    with torch.no_grad():
        for p in originals(model):
            p.mul_(1.5)


# Recycled memory


def buffer_of(t: Tensor) -> int:
    """Where it begins: a result starts somewhere within its first 4 KiB."""
    return t.data_ptr() // 4096


@both_modes
def test_later_steps_take_the_memory_of_earlier_ones(recycling, reuse):
    model, _, group = twins(reuse, build=Large)

    def step() -> set[int]:
        with group.scope():
            seen = {buffer_of(w) for w in list(weights(model).values())[:LARGE]}
            model(X).sum().backward()
        seen |= {buffer_of(p.grad) for p in originals(model)[1 : 2 * LARGE : 2]}
        model.zero_grad()
        change(model)
        return seen

    first = step() | step()
    held = wnkernel.cpu_buffers()
    for _ in range(4):
        assert step() <= first
    assert wnkernel.cpu_buffers() == held


@both_modes
def test_inference_takes_the_memory_of_one_forward(recycling, reuse):
    model, _, group = twins(reuse, build=Large)
    addresses, before = set(), used()
    with torch.no_grad():
        for _ in range(5):
            with group.scope():
                addresses |= {w.data_ptr() for w in list(weights(model).values())[:LARGE]}
                model(X)
            group.refresh()
    assert len(addresses) == LARGE
    assert used() == before


@both_modes
@pytest.mark.parametrize(
    "keep",
    [
        lambda w: w,
        lambda w: w.detach(),
        lambda w: w[3:5, 1],
        lambda w: w.detach().numpy(),
        lambda w: w.untyped_storage(),
        lambda w: torch.utils.dlpack.to_dlpack(w.detach()),
    ],
    ids=["tensor", "detached", "view", "numpy", "storage", "dlpack"],
)
def test_a_weight_that_is_still_seen_is_left_alone(recycling, keep, reuse):
    model, twin, group = twins(reuse, build=Large)
    with group.scope():
        address = model[0].weight.data_ptr()
        kept = keep(model[0].weight)
    for _ in range(3):
        change(model)
        model(X).sum().backward()
        model.zero_grad()
        with group.scope():
            assert model[0].weight.data_ptr() != address
    want = keep(twin[0].weight)
    if hasattr(want, "shape"):
        assert (kept == want).all()


def test_gradients_that_are_kept_stay(recycling):
    model, twin, _ = twins(build=Large)
    for module in (model, twin):
        module(X).sum().backward()
    kept = gradients(model)
    for _ in range(3):
        model.zero_grad()
        (model(X) * 2).sum().backward()
    for name, want in gradients(twin).items():
        assert torch.equal(kept[name], want)


@both_modes
def test_threads_do_not_share_weights_that_are_in_use(recycling, reuse):
    model, twin, group = twins(reuse, build=Large)
    barrier = threading.Barrier(3, timeout=PATIENCE_S)
    seen, failures = [], []

    def work() -> None:
        try:
            with wnkernel.use_backend("cpu"), torch.no_grad():
                want = list(weights(twin).values())
                for _ in range(20):
                    with group.scope():
                        got = list(weights(model).values())
                        seen.append([w.data_ptr() for w in got])
                        barrier.wait()  # all of them are in use
                        for w, x in zip(got, want, strict=True):
                            assert_same(w, x)
                        assert len({address for one in seen[-3:] for address in one}) == 9
                        barrier.wait()
        except Exception as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# Every weight has memory of its own


def own_memory(tensors: list[Tensor]) -> None:
    for t in tensors:
        assert t.untyped_storage().nbytes() == t.nbytes
        assert t.storage_offset() == 0
        assert t.data_ptr() % 64 == 0
        file = io.BytesIO()
        torch.save(t.detach(), file)
        assert file.tell() < t.nbytes + 2000
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)
    for t in tensors:
        before = [other._version for other in tensors]
        with torch.no_grad():
            t.detach().add_(1)
        assert [x._version - b for x, b in zip(tensors, before, strict=True)] == [
            int(other is t) for other in tensors
        ]


@both_modes
def test_weights_own_their_memory(route, reuse):
    model, _, group = twins(reuse)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), group.scope():
            own_memory(list(weights(model).values()))


def test_gradients_own_their_memory(route):
    model, _, _ = twins()
    model().sum().backward()
    own_memory([p.grad for p in originals(model)])


# What is held, and for how long


def test_memory_of_the_forward_mode(route):
    model, _, group = twins()
    for _ in range(2):
        with group.scope():
            assert group.memory()["slots"] == 0  # nothing was read yet
            size = sum(w.nbytes for w in weights(model).values())
            assert (group.memory()["slots"], group.memory()["slot_bytes"]) == (7, size)
            with torch.no_grad():
                model()
            assert (group.memory()["slots"], group.memory()["slot_bytes"]) == (14, 2 * size)
        assert (group.memory()["slots"], group.memory()["slot_bytes"]) == (0, 0)
    y = model()
    assert group.memory()["slots"] == 0
    y.sum().backward()


def test_memory_of_the_version_mode(route):
    model, _, group = twins("version")
    model()
    size = sum(w.nbytes for w in weights(model).values())
    assert (group.memory()["slots"], group.memory()["slot_bytes"]) == (7, size)
    for letting_go in (group.refresh, group.remove):
        letting_go()
        assert (group.memory()["slots"], group.memory()["slot_bytes"]) == (0, 0)
        model()


def test_memory_counts_all_threads(route):
    model, _, group = twins("version")
    computed, done = threading.Event(), threading.Event()

    def work() -> None:
        with torch.no_grad():
            model()
        computed.set()
        done.wait(PATIENCE_S)

    thread = threading.Thread(target=work)
    thread.start()
    assert computed.wait(PATIENCE_S)
    model()
    assert group.memory()["slots"] == 14
    done.set()
    thread.join()
    del thread
    gc.collect()
    assert group.memory()["slots"] == 7


def test_memory_reports_what_waits_for_the_next_step(recycling):
    model, _, group = twins(build=Large)
    with torch.no_grad():
        model(X)
    assert group.memory()["idle_bytes"] == 2 * 256 * 320 * 4
    assert group.memory()["idle_bytes"] == wnkernel.cpu_buffers()["held_bytes"]


@both_modes
def test_results_go_with_the_last_reference(recycling, reuse):
    """No reference cycle, neither through the node nor through the group."""
    model, _, group = twins(reuse, build=Large)
    before = used()
    with without_gc():
        for create_graph in (False, True):
            loss = model(X).square().sum()
            grads = torch.autograd.grad(loss, originals(model), create_graph=create_graph)
            group.refresh()
            assert used() > before
            del loss, grads
            assert used() == before


@both_modes
def test_a_group_keeps_no_model_alive(route, reuse):
    model = Net()
    group = wnkernel.fuse(model, reuse=reuse)
    root = weakref.ref(model)
    with without_gc():
        model().sum().backward()
        with group.scope():
            model()
        del model
        assert root() is None


@both_modes
@pytest.mark.parametrize("handle", ["kept", "dropped"])
def test_a_group_keeps_no_weights_alive(route, reuse, handle):
    model = Net()  # no twin: copies share the class that parametrize made, which knows the original
    group = wnkernel.fuse(model, reuse=reuse)
    model().sum().backward()
    alive = [weakref.ref(p) for p in (*model.parameters(), *model.modules())]
    del model
    if handle == "dropped":
        del group
    gc.collect()  # a parametrized layer is a reference cycle, in torch too
    assert [ref() for ref in alive if ref() is not None] == []
    assert handle == "dropped" or group.memory()["slots"] == 0


def test_layers_lists_every_weight():
    model = Net()
    group = wnkernel.fuse(model)
    assert group.layers == [f"{name}.weight" for name in LAYERS]
    assert repr(group) == "WeightNormGroup(7 weights, reuse='forward')"
    del model.back
    gc.collect()
    assert group.layers == [f"{name}.weight" for name in LAYERS if "back" not in name]
