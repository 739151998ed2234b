"""Turns signals that end the process into exceptions, so that half-written files can be deleted."""

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
    """Raises :class:`Interrupted` for the first signal in a ``with`` block.

    Later signals are ignored, so that they cannot stop the cleaning up. :class:`Interrupted` is
    raised a second time at the end of the block, because libraries that call back into Python may
    replace the first one by an error of their own. A signal that comes while the handlers are set
    or restored takes effect after the last of them.

    Args:
        note: a text that the message of the exception ends with.
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
                # A signal that is ignored, as under nohup, stays so. None stands for a handler that
                # Python did not set and so could not restore.
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
        """Ignore all signals from now on."""
        self._ignored = True

    def check(self) -> None:
        """Raise :class:`Interrupted` if a signal came before."""
        if self._received is not None:
            raise Interrupted(self._received, self._note)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._received is None and not self._ignored:
            self._received = number
            if self._inside:
                raise Interrupted(number, self._note)
