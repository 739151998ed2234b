"""A worker, and what becomes of requests."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from ..compiling import shared_folder
from ..processes import PATIENCE_S, ROOT
from .build import PAIRS, library, runtimes
from .protocol import read, write


class Worker:
    """Runs the kernels of one library. Started anew after a request has ended it."""

    def __init__(self, library: Path, log: Path) -> None:
        self._command = [sys.executable, "-m", "simt.worker", str(library)]
        self._log = log
        self._environment = os.environ | {
            "LD_PRELOAD": " ".join(runtimes()),
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: object) -> Any:
        """The answer. AssertionError with what was printed where the process ends."""
        if self._process is None:
            with self._log.open("w") as log:
                self._process = subprocess.Popen(
                    self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                    cwd=ROOT / "tests", env=self._environment,
                )  # fmt: skip
        watchdog = threading.Timer(PATIENCE_S, self._process.kill)
        watchdog.start()
        try:
            write(request, self._process.stdin)
            return read(self._process.stdout)
        except (BrokenPipeError, EOFError):
            code = self._process.wait()
            self.close()
            raise AssertionError(
                f"the worker ended with {code}:\n{self._log.read_text()}"
            ) from None
        finally:
            watchdog.cancel()

    def close(self) -> None:
        if self._process is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()
            self._process = None


@contextmanager
def worker(
    folders: pytest.TempPathFactory,
    pairs: Sequence[str] = PAIRS,
    name: str = "kernels",
    write: Callable[[Path], None] | None = None,
) -> Iterator[Worker]:
    """One for the kernels of some pairs of types, as in library(); ``name`` is for what is written.
    Compiled once for all processes of pytest-xdist."""
    kernels = library(shared_folder(folders, name), pairs, write)
    process = Worker(kernels, folders.mktemp("worker") / "log")
    yield process
    process.close()
