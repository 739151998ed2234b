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
        self._path, self._say = path, say
        self._lock = threading.Lock()
        self._lines: Counter[str] = Counter()
        self._start = self._flushed = time.monotonic()
        self._file: gzip.GzipFile | None = None
        self._do(lambda: setattr(self, "_file", gzip.GzipFile(path, "wb", compresslevel=6)))

    def line(self, step: str, text: str) -> None:
        """One line, with the time since the beginning and its step."""
        with self._lock:
            self._lines[step] += 1
            if self._lines[step] == MOST_LINES:
                text = "(the rest of this step's lines is left out)"
            if self._lines[step] <= MOST_LINES:
                seconds = time.monotonic() - self._start
                self._write(f"[{seconds:6.1f} {step}] {text[:MOST_CHARACTERS]}\n")

    def flush(self) -> None:
        """Bring to the disk what was written so far, unless that was done just now."""
        with self._lock:
            self._write("")

    def close(self) -> None:
        """Nothing is written after this."""
        with self._lock:
            if self._file is not None:
                self._do(self._file.close)
            self._file = None

    def _write(self, text: str) -> None:
        if self._file is not None:
            file, is_due = self._file, time.monotonic() - self._flushed > FLUSH_S
            self._do(lambda: (file.write(text.encode()), file.flush() if is_due else None))
            self._flushed = time.monotonic() if is_due else self._flushed

    def _do(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            self._file = None
            self._say(f"{self._path} cannot be written: {error.strerror or error}")
