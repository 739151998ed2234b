"""What can go wrong, each with its exit code."""

from __future__ import annotations

import errno
import re
import signal
from pathlib import Path


class CliError(Exception):
    """Ends the command with one line on stderr."""

    exit_code: int


class NothingToConvert(CliError):
    """No weight norm in the file, or all of them in the layout that was asked for."""

    exit_code = 1


class WrongUsage(CliError):
    """Arguments that do not go together."""

    exit_code = 2


class BadInput(CliError):
    """A file that cannot be read, must not be, or contradicts itself."""

    exit_code = 3


class CannotWrite(CliError):
    """The output exists, or cannot be made, or cannot hold what it is asked to."""

    exit_code = 4


class WrongResult(CliError):
    """A benchmark's output is not what float64 says."""

    exit_code = 5


class OutOfMemory(CliError):
    """The system, or a limit, gave no memory, wherever it was asked for."""

    exit_code = 6


class Interrupted(BaseException):
    """A signal asked the process to end. Not an ``Exception``, as KeyboardInterrupt is none."""

    def __init__(self, number: int, note: str) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}{note}")
        self.exit_code = 128 + number


BUG = 70
"""Python's own exit code for a bug would be that of a file with nothing to convert."""

NOBODY_READS = 128 + 13
"""As of a process that SIGPIPE ends."""

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
    """An error of any library in our words, if it says that there is no memory; else None.

    Args:
        error: what was raised.
        what: the file or the case that it was for.
    """
    text, number = str(error), getattr(error, "errno", None)
    is_known = isinstance(error, MemoryError) or number == errno.ENOMEM
    may_say_so = isinstance(error, (RuntimeError, OSError)) and number is None  # or it names a file
    if not (is_known or (may_say_so and _NO_MEMORY.search(text))):
        return None
    asked = _ASKED.search(text)
    prefix = "" if what is None else f"{what}: "
    return OutOfMemory(
        f"{prefix}out of memory" + (f": {asked[1]} bytes were asked for" if asked else "")
    )


def cannot_read(path: Path, error: OSError) -> CliError:
    """What the system says of an input."""
    return out_of_memory(error, path) or BadInput(f"{path}: {error.strerror or one_line(error)}")


def one_line(error: BaseException) -> str:
    """What an exception of a library says, without its advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def printable(text: str) -> str:
    """Keys and names come from files: nothing in them may talk to the terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
