"""What was computed lives as long as the outermost forward, whatever ends it, and in its thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wnkernel

from ..changes import UNSEEN, training_step
from ..groups import (
    Computed,
    Net,
    assert_same,
    assert_same_models,
    assert_same_tensors,
    both_modes,
    ramp,
    twins,
    weights,
)
from ..processes import PATIENCE_S


class Hooked(nn.Module):
    """A net, and something that happens in the middle of the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.between: Callable[[], Any] = nothing

    def forward(self) -> Tensor:
        first = self.net.front()
        self.between()
        return torch.cat([first, self.net.back()])


def nothing() -> None:
    pass


def change_without_a_trace(*models: nn.Module) -> None:
    for model in models:
        UNSEEN[".data"](model)


def test_a_forward_leaves_nothing_behind(backend: str) -> None:
    model, twin, group = twins("forward", Hooked)
    held = []
    model.between = lambda: held.append(group.memory())
    assert_same(model(), twin())
    expected = {"slots": 7, "slot_bytes": sum(w.nbytes for w in weights(twin).values())}
    assert expected.items() <= held[0].items()
    assert {"slots": 0, "slot_bytes": 0}.items() <= group.memory().items()


def test_in_version_mode_the_last_launch_is_held(backend: str) -> None:
    model, twin, group = twins("version")
    for _ in range(2):
        model()
        assert group.memory()["slots"] == 7
        assert group.memory()["slot_bytes"] == sum(w.nbytes for w in weights(twin).values())
    group.refresh()
    assert group.memory()["slots"] == 0


def test_the_memory_of_weights_is_free_after_the_forward(recycling: None) -> None:
    model, _, _ = twins("forward", Hooked)
    used = wnkernel.cpu_buffers()["used_bytes"]
    held = []
    model.between = lambda: held.append(wnkernel.cpu_buffers()["used_bytes"])
    with torch.no_grad():
        model()
    assert held[0] >= used + model.net.front.wide.weight.nbytes
    assert wnkernel.cpu_buffers()["used_bytes"] == used


def test_containers_share_the_launch_of_the_outermost(backend: str, computed: Computed) -> None:
    model, twin, group = twins("forward", Hooked)
    held = []
    model.between = lambda: held.append(group.memory()["slots"])
    want = twin()
    computed.take()
    assert_same(model(), want)
    assert computed.take() == ([7], 0)
    assert held == [7]
    for container in (model.net.front, model.net.back):
        container()
        assert computed.take() == ([3], 0)
        assert group.memory()["slots"] == 0


@both_modes
def test_recursion_is_one_scope(backend: str, reuse: str, computed: Computed) -> None:
    class Recursive(Net):
        def forward(self, depth: int = 3) -> Tensor:
            y = super().forward()
            return torch.cat([y, self(depth - 1)]) if depth else y

    model, twin, group = twins(reuse, Recursive)
    want = twin()
    computed.take()
    assert_same(model(), want)
    assert computed.take() == ([7], 0)
    assert group.memory()["slots"] == (0 if reuse == "forward" else 7)
    assert_same_models(model, twin)


# with group.scope()


def test_a_scope_spans_several_forwards(backend: str, computed: Computed) -> None:
    model, twin, group = twins("forward")
    want = twin()
    computed.take()
    with group.scope():
        w = model.head.weight
        for _ in range(2):
            assert_same(model(), want)
            assert_same(model.front(), want[: model.front().numel()])
        with group.scope():
            assert model.head.weight is w
        assert model.head.weight is w
    assert computed.take() == ([7], 0)
    assert group.memory()["slots"] == 0
    assert model.head.weight is not w


def test_a_scope_within_a_forward_does_not_end_it(backend: str, computed: Computed) -> None:
    model, twin, group = twins("forward", Hooked)
    want = twin()

    def scope() -> None:
        with group.scope():
            weights(model)

    model.between = scope
    computed.take()
    assert_same(model(), want)
    assert computed.take() == ([7], 0)
    assert group.memory()["slots"] == 0


def test_a_scope_ends_with_an_exception(backend: str) -> None:
    model, twin, group = twins("forward")
    for error in ERRORS:
        with suppress(error), group.scope():
            model()
            raise error
        assert group.memory()["slots"] == 0
        change_without_a_trace(model, twin)
        assert_same_models(model, twin)


def test_an_interrupt_while_a_scope_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, group = twins("forward")
    state = group._roster.threads.current
    enter = state.enter

    def interrupted(*args: Any) -> None:
        enter(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(state, "enter", interrupted)
    with pytest.raises(KeyboardInterrupt), group.scope():
        pass
    assert not state.stack


@both_modes
def test_refresh_within_a_scope_counts_at_once(backend: str, reuse: str) -> None:
    model, twin, group = twins(reuse)
    with group.scope():
        assert_same_models(model, twin)
        change_without_a_trace(model, twin)
        group.refresh()
        assert_same_models(model, twin)


@both_modes
def test_removal_within_a_forward(backend: str, reuse: str, computed: Computed) -> None:
    model, twin, group = twins(reuse, Hooked)
    model.between = group.remove
    assert_same(model(), twin())
    assert group.memory()["slots"] == 0
    computed.take()
    with group.scope():  # of nothing
        weights(model)
    assert computed.take() == ([], 7)


# Exceptions


ERRORS = [ValueError, KeyboardInterrupt, SystemExit]  # torch runs no hooks after the last two

PLACES: dict[str, Callable[[Hooked, Callable], Any]] = {
    "first pre-hook": lambda m, hook: m.register_forward_pre_hook(hook, prepend=True),
    "pre-hook": lambda m, hook: m.register_forward_pre_hook(hook),
    "pre-hook of a container": lambda m, hook: m.net.back.register_forward_pre_hook(hook),
    "hook of a layer": lambda m, hook: m.net.back.image.register_forward_hook(hook),
    "hook of a container": lambda m, hook: m.net.back.register_forward_hook(hook),
    "hook": lambda m, hook: m.register_forward_hook(hook),
    "first hook": lambda m, hook: m.register_forward_hook(hook, prepend=True),
}

READS: dict[str, Callable[[Hooked], Tensor]] = {
    "forward": lambda model: model(),
    "container": lambda model: model.net.front(),
    "weight": lambda model: model.net.front.conv.weight,
}


@contextmanager
def failing(model: Hooked, place: str, error: type[BaseException]) -> Iterator[None]:
    def fail(*_: object) -> None:
        raise error

    if place == "forward":
        model.between = fail
        yield
        model.between = nothing
    else:
        handle = PLACES[place](model, fail)
        yield
        handle.remove()


@pytest.mark.parametrize("within", ["nothing", "scope"])
@pytest.mark.parametrize("read", [*READS, "weight in a scope"])
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("place", ["forward", *PLACES])
def test_whatever_ends_a_forward_ends_its_scope(
    place: str, error: type[BaseException], read: str, within: str
) -> None:
    model, twin, group = twins("forward", Hooked)
    scope = group.scope() if within == "scope" else nullcontext()
    with failing(model, place, error), scope, pytest.raises(error):
        model()
    if error is ValueError or within == "scope":
        assert group.memory()["slots"] == 0
    change_without_a_trace(model, twin)
    with group.scope() if "scope" in read else nullcontext():
        assert_same(READS[read.split()[0]](model), READS[read.split()[0]](twin))
    assert group.memory()["slots"] == 0
    assert_same(model(), twin())
    assert group.memory()["slots"] == 0


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("place", ["forward", *PLACES])
def test_in_version_mode_slots_outlive_exceptions(
    place: str, error: type[BaseException], computed: Computed
) -> None:
    model, twin, _ = twins("version", Hooked)
    model()
    with failing(model, place, error), pytest.raises(error):
        model()
    computed.take()
    y = model()
    assert computed.take() == ([], 0)
    assert_same(y, twin())
    for module in (model, twin):
        training_step(torch.optim.SGD, lr=0.1)(module)
    assert_same(model(), twin())


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("place", ["pre-hook of a container", "hook of a container"])
def test_swallowed_exceptions_do_not_end_the_scope_around(
    place: str, error: type[BaseException], computed: Computed
) -> None:
    class Swallowing(Hooked):
        def forward(self) -> Tensor:
            y = self.net.front()
            with suppress(error):
                self.net.back()
            return torch.cat([y, self.net.front(), self.net.head(ramp(2, 9)).flatten()])

    model, twin, group = twins("forward", Swallowing)
    for forward in range(2):
        with failing(twin, place, error):
            want = twin()
        computed.take()
        with failing(model, place, error):
            assert_same(model(), want)
        once_more = 4 if "pre-hook" in place else 7
        assert computed.take() == ([once_more if forward else 7], 0)
        assert group.memory()["slots"] == 0
        change_without_a_trace(model, twin)


# Threads


@contextmanager
def thread() -> Iterator[Callable[..., Any]]:
    """Runs a function in another thread, always the same, and waits for its result."""
    with ThreadPoolExecutor(1) as pool:
        yield lambda function, *args: pool.submit(function, *args).result(PATIENCE_S)


def on(backend: str, function: Callable[..., Any], *args: Any) -> Any:
    """The choice of a backend belongs to a thread."""
    with wnkernel.use_backend(backend):
        return function(*args)


@both_modes
def test_a_thread_does_not_see_what_another_computed(backend: str, reuse: str) -> None:
    model, twin, group = twins(reuse, Hooked)
    held = []

    def between() -> None:
        change_without_a_trace(model, twin)
        assert_same_tensors(run(on, backend, weights, model), weights(twin))
        assert_same(run(on, backend, model.net), twin.net())
        held.append(group.memory()["slots"])

    model.between = between
    with thread() as run:
        model()
        assert held == [7 if reuse == "forward" else 14]
        assert group.memory()["slots"] == (0 if reuse == "forward" else 14)


@pytest.mark.parametrize("what", ["refresh", "step"])
def test_refresh_and_steps_reach_every_thread(backend: str, what: str) -> None:
    model, twin, group = twins("version")
    with thread() as run:
        for _ in range(2):
            assert_same(run(on, backend, model), twin())
            if what == "refresh":
                change_without_a_trace(model, twin)
                group.refresh()
            else:
                for module in (model, twin):
                    training_step(torch.optim.SGD, lr=0.1, fused=True)(module)


def test_forwards_of_several_threads_at_once(backend: str) -> None:
    """Each waits in the middle for the others."""
    model, twin, group = twins("forward", Hooked)
    want = twin()
    barrier = threading.Barrier(3)
    model.between = partial(barrier.wait, PATIENCE_S)
    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            forwards = [pool.submit(on, backend, model) for _ in range(3)]
            for forward in forwards:
                assert_same(forward.result(PATIENCE_S), want)
            assert group.memory()["slots"] == 0
