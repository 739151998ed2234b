"""The log of a visit: every line of every step, gzipped, on disk a second after it was written."""

from __future__ import annotations

import gzip
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

FLUSH_S = 1.0

MOST_LINES = 50_000
"""Of one step. A tool that reports every thread of every launch must not fill the disk."""

MOST_CHARACTERS = 2_000
"""Of one line."""


class Log:
    """Takes lines from several threads.

    A disk that is full, or any other error of the file, is said once, and ends the writing and
    nothing else.

    Args:
        path: where, overwritten.
        say: takes the one line about an error.
    """

    def __init__(self, path: Path, say: Callable[[str], None] = print) -> None:
        self.path = path
        self._say = say
        self._lock = threading.Lock()
        self._lines: Counter[str] = Counter()
        self._start = self._flushed = time.monotonic()
        self._file: gzip.GzipFile | None = None
        try:
            self._file = gzip.GzipFile(path, "wb", compresslevel=6)
        except OSError as error:
            self._give_up(error)

    def line(self, step: str, text: str) -> None:
        """One line, with the time since the beginning and its step."""
        with self._lock:
            self._lines[step] += 1
            if self._lines[step] > MOST_LINES:
                return
            if self._lines[step] == MOST_LINES:
                text = "(the rest of this step's lines is left out)"
            seconds = time.monotonic() - self._start
            line = f"[{seconds:6.1f} {step}] {text[:MOST_CHARACTERS]}\n"
            self._write(line, flush=self._is_due())

    def flush(self) -> None:
        """Bring to the disk what was written so far, unless that was done just now."""
        with self._lock:
            self._write("", flush=self._is_due())

    def close(self) -> None:
        """Nothing is written after this."""
        with self._lock:
            try:
                if self._file is not None:
                    self._file.close()
            except OSError as error:
                self._give_up(error)
            self._file = None

    def _is_due(self) -> bool:
        return time.monotonic() - self._flushed > FLUSH_S

    def _write(self, text: str, *, flush: bool) -> None:
        if self._file is None:
            return
        try:
            self._file.write(text.encode())
            if flush:
                self._file.flush()
                self._flushed = time.monotonic()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._file = None
        self._say(f"{self.path} cannot be written: {error.strerror or error}")
