"""Signals that this process gets, with nothing left to chance."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

import pytest

from wnkernel.cli.signals import ENDING

from .processes import PATIENCE_S


@pytest.fixture
def heard() -> Iterator[None]:
    """No signal is ignored, and none ends the tests. Scripts start what they run in the background
    with SIGINT ignored, and nohup does so with SIGHUP; pytest and its processes inherit that."""

    def not_handled(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"{signal.Signals(number).name} would have ended the process")

    before = {number: signal.signal(number, not_handled) for number in ENDING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def receive(number: int, by: str = "this thread") -> None:
    """Get a signal, and go on when its handler is done, unless that raises.

    Python only notes a signal when it comes. The main thread runs the handler a few instructions
    later, and much later than that where another thread was interrupted: of all threads of a
    process the system may choose any.

    Args:
        number: the signal. One that is ignored is gone at once.
        by: the thread that is interrupted, "this thread" or "another thread".
    """
    handler = signal.getsignal(number)
    if handler is signal.SIG_IGN:
        signal.raise_signal(number)
        return
    assert callable(handler), f"signal {number} would end the process"
    done = threading.Event()

    def noted(number: int, frame: FrameType | None) -> None:
        try:
            handler(number, frame)
        finally:
            done.set()

    signal.signal(number, noted)
    try:
        if by == "this thread":
            signal.raise_signal(number)
        else:
            other = threading.Thread(target=signal.raise_signal, args=(number,))
            other.start()
            other.join()
        deadline = time.monotonic() + PATIENCE_S
        while not done.is_set():
            assert time.monotonic() < deadline, f"no handler ran for signal {number}"
            time.sleep(0.001)
    finally:
        signal.signal(number, handler)
