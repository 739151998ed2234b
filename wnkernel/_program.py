"""Ctrl-C while torch is imported, which takes seconds, where this package is the program."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType


def is_program() -> bool:
    """Whether this is ``python -m wnkernel`` or the script ``wnkernel``."""
    arguments = getattr(sys, "argv", None) or [""]
    if arguments[0] == "-m":  # the package is imported first, and the name is set after that
        return sys.orig_argv[-len(arguments)].removeprefix("-m") == "wnkernel"
    return Path(arguments[0]).stem == "wnkernel"


def _end(number: int, _: FrameType | None) -> None:
    """At once: an exception would come out of whatever is imported, if it comes out at all."""
    os.write(2, f"wnkernel: ended by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


# Until a command has its own way of ending. Other signals are silent as they are.
if is_program() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)
