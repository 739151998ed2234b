"""Runs the command line once. An error ends it with a line on standard error; with ``--json`` there
is also an object on standard output."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TextIO

import typer

from . import report
from .app import app
from .errors import (
    BUG,
    NOBODY_READS,
    CannotWrite,
    CliError,
    Interrupted,
    WrongUsage,
    out_of_memory,
    printable,
)
from .signals import Signals

UsageError: type[Any] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "UsageError")
"""The base class of typer's errors about options. Some versions of typer have it only under a
private name, so it is looked up here."""


class StreamFailed(BaseException):
    """A standard stream cannot be written. This is no ``OSError``, because rich and typer catch
    those, and end the process with an exit code that has another meaning here."""


class _Stream:
    """A standard stream that raises :class:`StreamFailed` instead of ``OSError``."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            raise self._failed(error) from error

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> StreamFailed:
        with suppress(OSError):  # at its exit Python would try to write the rest, and fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        return StreamFailed(f"{self._stream.name}: {error.strerror}")


def run(arguments: Sequence[str]) -> int:
    """Run a command, and return its exit code."""
    streams = sys.stdout, sys.stderr
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # some terminals cannot show all names
    # Python has None in the place of a stream that was closed.
    sys.stdout, sys.stderr = (_Stream(stream or io.StringIO()) for stream in streams)
    try:
        code = _run(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        return code
    except StreamFailed as failed:
        if isinstance(failed.__cause__, BrokenPipeError):
            return NOBODY_READS
        with suppress(StreamFailed):
            print(f"wnkernel: {failed}", file=sys.stderr)
        return CannotWrite.exit_code
    finally:
        sys.stdout, sys.stderr = streams


def _run(arguments: Sequence[str]) -> int:
    try:
        with Signals():
            return app(list(arguments), prog_name="wnkernel", standalone_mode=False) or 0
    except (CliError, Interrupted) as error:
        text, code = str(error), error.exit_code
    except UsageError as error:
        text, code = " ".join(error.format_message().split()), WrongUsage.exit_code
    except Exception as error:
        if memory := out_of_memory(error):
            text, code = str(memory), memory.exit_code
        else:
            traceback.print_exc()
            text, code = f"a bug: {error!r}", BUG
    if "--json" in arguments:
        print(report.as_json({"error": text, "exit_code": code}))
    print(f"wnkernel: {printable(text)}", file=sys.stderr)
    return code
