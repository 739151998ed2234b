"""Signals that end the process, as exceptions: what is half-written can then be taken away."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from .errors import Interrupted

ENDING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


class Signals:
    """Raises :class:`Interrupted` in a ``with`` block, once: a second signal must not stop the
    cleaning up. It is raised again at the end of the block, for libraries that call back into
    Python may turn the first into an error of theirs. One that comes while the handlers are set or
    restored waits until all of them are.

    Args:
        note: what to tell besides.
    """

    def __init__(self, note: str = "") -> None:
        self._note = note
        self._received: int | None = None
        self._ignored = False
        self._inside = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in ENDING:
                # nohup has some ignored; a handler that is not Python's could not be restored
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._previous[number] = signal.signal(number, self._handle)
        self._inside = True
        if self._received is not None:
            self.__exit__()
        return self

    def __exit__(self, *_: object) -> None:
        self._inside = False
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self.check()

    def ignore(self) -> None:
        """From now on a signal is too late."""
        self._ignored = True

    def check(self) -> None:
        """Raise if a signal came and was swallowed."""
        if self._received is not None:
            raise Interrupted(self._received, self._note)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._received is None and not self._ignored:
            self._received = number
            if self._inside:
                raise Interrupted(number, self._note)
