"""How Ctrl-C ends the command line while torch is being imported, which takes seconds."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType


def is_program() -> bool:
    """Whether this process runs ``python -m wnkernel`` or the script ``wnkernel``."""
    arguments = getattr(sys, "argv", None) or [""]
    if arguments[0] == "-m":  # Python sets the file's name after importing the package
        return sys.orig_argv[-len(arguments)].removeprefix("-m") == "wnkernel"
    return Path(arguments[0]).stem == "wnkernel"


def _end(number: int, _: FrameType | None) -> None:
    """End the process at once. An exception would be raised in the module that is being imported,
    which might catch it."""
    os.write(2, f"wnkernel: ended by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


# This holds until a command handles signals itself. Other signals never print a traceback.
if is_program() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)
