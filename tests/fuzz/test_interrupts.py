"""Ctrl-C at any bytecode of ours: what comes next is right, fresh, and holds no memory.

Interrupts come between two bytecodes. A trace function raises one there, so that each of them gets
its turn and none is left to chance.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import wnkernel
from wnkernel import WeightNormGroup

from ..groups import (
    assert_plain,
    assert_same,
    assert_same_models,
    both_modes,
    originals,
    twins,
    weights,
)
from . import cases

OURS = str(Path(wnkernel.__file__).parent)

Action = Callable[[nn.Module, WeightNormGroup], object]


class Interrupt(BaseException):
    """As KeyboardInterrupt, which pytest takes for its own."""


def interrupted(at: int, action: Callable[[], object]) -> int:
    """Run something with an interrupt before the bytecode number ``at`` of ours; how many there
    were until then."""
    count = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            count += 1
            if count == at:
                raise Interrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except Interrupt:
        pass
    finally:
        sys.settrace(before)
    return count


def interrupt_everywhere(
    action: Callable[[], object],
    then: Callable[[], object],
    undo: Callable[[], object] = lambda: None,
) -> None:
    """Interrupt something at each of its bytecodes, or at as many as there are cases.

    Args:
        action: what is interrupted.
        then: what is looked at afterwards, every time.
        undo: what comes after an ``action`` that was not interrupted.
    """
    for _ in range(2):  # the first fills caches; Python 3.12 sees no bytecodes in it, 3.13 not all
        last = interrupted(0, action)
        undo()
    moments = random.Random(0).sample(range(1, last + 1), min(cases(40), last))
    hit = 0
    for at in moments:
        hit += interrupted(at, action) == at
        then()
    assert hit > len(moments) // 2


def train(model: nn.Module, group: WeightNormGroup) -> None:
    model().sum().backward()


def read(model: nn.Module, group: WeightNormGroup) -> None:
    with group.scope():
        weights(model)


def change_without_a_trace(*models: nn.Module) -> None:
    for model in models:
        for p in originals(model):
            p.data.neg_().add_(0.25)


@both_modes
@pytest.mark.parametrize("action", [train, read])
def test_the_next_forward_is_right_and_fresh(reuse: str, action: Action) -> None:
    model, twin, group = twins(reuse)

    def look() -> None:
        change_without_a_trace(model, twin)
        if reuse == "version":
            group.refresh()  # as docs/fuse.md asks after such a change
        assert_same(model(), twin())
        assert_same(model.head.weight, twin.head.weight)
        with torch.no_grad():
            assert_same(model(), twin())
        if reuse == "forward":
            assert group.memory()["slots"] == 0

    interrupt_everywhere(lambda: action(model, group), look)


def is_fused(model: nn.Module) -> bool:
    try:
        WeightNormGroup.of(model)
    except ValueError:
        return False
    return True


@both_modes
def test_fuse_does_all_or_nothing(reuse: str) -> None:
    model, twin, group = twins(reuse)
    group.remove()

    def look() -> None:
        assert_same_models(model, twin)
        if is_fused(model):
            WeightNormGroup.of(model).remove()
        assert_plain(model)

    interrupt_everywhere(lambda: wnkernel.fuse(model, reuse=reuse), look, look)


@both_modes
def test_remove_can_be_repeated(reuse: str) -> None:
    model, twin, _ = twins(reuse)

    def look() -> None:
        assert_same_models(model, twin)
        if is_fused(model):
            WeightNormGroup.of(model).remove()
        assert_plain(model)
        assert all(getattr(module, "bucket", None) is None for module in model.modules())
        wnkernel.fuse(model, reuse=reuse)

    interrupt_everywhere(lambda: WeightNormGroup.of(model).remove(), look, look)
