"""Tests are told when they leave something behind for the others."""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

import wnkernel

from ..shared_state import SHARED, left_behind, shared_state
from ..torch_modes import Dispatches, Functions, deterministic


@contextmanager
def set_to(setter: Callable[[Any], object], value: Any, before: Any) -> Iterator[None]:
    setter(value)
    yield
    setter(before)


@contextmanager
def patched(change: Callable[[pytest.MonkeyPatch], object]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        change(patch)
        yield


def collect(wanted: bool) -> None:
    (gc.enable if wanted else gc.disable)()


def handle_interrupts(handler: Any) -> None:
    signal.signal(signal.SIGINT, handler)


CHANGES: dict[str, Callable[[], AbstractContextManager]] = {
    "backend": lambda: wnkernel.use_backend("eager"),
    "current folder": lambda: patched(lambda patch: patch.chdir("/")),
    "default device": lambda: torch.device("meta"),
    "default dtype": lambda: set_to(torch.set_default_dtype, torch.float64, torch.float32),
    "deterministic algorithms": deterministic,
    "dispatch modes": Dispatches,
    "environment": lambda: patched(lambda patch: patch.setenv("LEFT_BY_A_TEST", "1")),
    "function modes": Functions,
    "garbage collection": lambda: set_to(collect, False, True),
    "grad mode": torch.no_grad,
    "handlers of signals": lambda: set_to(
        handle_interrupts, lambda *_: None, signal.getsignal(signal.SIGINT)
    ),
    "hooks of modules": lambda: register_module_forward_hook(lambda *_: None),
    "hooks of optimizers": lambda: register_optimizer_step_post_hook(lambda *_: None),
    "inference mode": torch.inference_mode,
    "search path": lambda: patched(lambda patch: patch.syspath_prepend("/")),
    "threads": lambda: set_to(
        torch.set_num_threads, torch.get_num_threads() + 1, torch.get_num_threads()
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_what_is_left_behind_is_seen(name: str) -> None:
    before = shared_state()
    with CHANGES[name]():
        assert name in left_behind(before, shared_state())
    assert left_behind(before, shared_state()) == []


def test_variables_of_the_environment_are_named_and_not_shown() -> None:
    before = shared_state()
    with CHANGES["environment"]():
        assert left_behind(before, shared_state()) == ["environment", "LEFT_BY_A_TEST"]


def test_the_steps_that_groups_count_are_no_leftover() -> None:
    before = shared_state()
    wnkernel.fuse(wnkernel.weight_norm(torch.nn.Linear(3, 3)), reuse="version")
    assert left_behind(before, shared_state()) == []
