"""The errors that end the command line, and their exit codes."""

from __future__ import annotations

import errno
import re
import signal
from pathlib import Path


class CliError(Exception):
    """An error that ends the command with one line on standard error."""

    exit_code: int


class NothingToConvert(CliError):
    """The file has no weight norm, or every weight norm already has the layout asked for."""

    exit_code = 1


class WrongUsage(CliError):
    """An argument is malformed, or does not fit the others."""

    exit_code = 2


class BadInput(CliError):
    """An input cannot be read, is refused, or contradicts itself."""

    exit_code = 3


class CannotWrite(CliError):
    """The output exists, cannot be made, or has a format that cannot hold the contents."""

    exit_code = 4


class WrongResult(CliError):
    """The result of a backend is too far from the result in float64."""

    exit_code = 5


class OutOfMemory(CliError):
    """An allocation failed, because the system has no memory or our limit was reached."""

    exit_code = 6


class Interrupted(BaseException):
    """A signal asked the process to end. Like KeyboardInterrupt it is no ``Exception``, so that
    ``except Exception`` does not catch it."""

    def __init__(self, number: int, note: str) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}{note}")
        self.exit_code = 128 + number


BUG = 70
"""The exit code of an unexpected exception. Python's own, 1, means here that there was nothing to
convert."""

NOBODY_READS = 128 + 13
"""The exit code if the reader of our output is gone, as of a process that SIGPIPE ends."""

EXIT_CODES = """Exit codes: 0 done; 1 nothing to convert; 2 wrong usage, or a missing package; \
3 an input that cannot be read, or contradicts itself; 4 an output that cannot be written; \
5 a wrong result (bench); 6 out of memory; 70 a bug, with a traceback; 128 + n ended by signal n \
(130 for Ctrl-C, 141 where nobody reads what is printed)."""


_NO_MEMORY = re.compile(
    r"(?:can't|cannot) allocate (?:memory|\d+ bytes)|bad_alloc|out of memory|not enough memory",
    re.IGNORECASE,
)
_ASKED = re.compile(r"(?:allocate|mmap) (\d+) bytes")


def out_of_memory(error: BaseException, what: object = None) -> OutOfMemory | None:
    """Translate an error of any library that says that there is no memory; return None for others.

    Args:
        error: the exception that the library raised.
        what: the file or the case that needed the memory, for the message.
    """
    text, number = str(error), getattr(error, "errno", None)
    is_known = isinstance(error, MemoryError) or number == errno.ENOMEM
    # The text of an OSError with a number may contain the name of a file.
    may_say_so = isinstance(error, (RuntimeError, OSError)) and number is None
    if not (is_known or (may_say_so and _NO_MEMORY.search(text))):
        return None
    asked = _ASKED.search(text)
    prefix = "" if what is None else f"{what}: "
    return OutOfMemory(
        f"{prefix}out of memory" + (f": {asked[1]} bytes were asked for" if asked else "")
    )


def cannot_read(path: Path, error: OSError) -> CliError:
    """Translate an error of the system for an input."""
    return out_of_memory(error, path) or BadInput(f"{path}: {error.strerror or one_line(error)}")


def one_line(error: BaseException) -> str:
    """Return the first line of an exception's message; libraries put advice into later lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def printable(text: str) -> str:
    """Escape what is not printable: keys and names come from files, and must not send control
    sequences to the terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
