"""The command line ``wnkernel``. Nothing outside this package imports it, and only this file runs
where the packages that it needs are missing."""

from __future__ import annotations

import importlib.util
import io
import sys
import traceback

MISSING_PACKAGE = 2
BUG = 70
"""Exit codes; the others are in errors.py. Python's own for a bug would be that of a file with
nothing to convert."""

NEEDED = ("typer", "rich", "safetensors")


def main() -> None:
    """Run the command line, or say what to install."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"wnkernel: the command line needs {', '.join(missing)}: pip install 'wnkernel[cli]'",
            file=sys.stderr,
        )
        sys.exit(MISSING_PACKAGE)
    from .app import app

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names that a terminal cannot show
    try:
        app(prog_name="wnkernel")
    except Exception:
        traceback.print_exc()
        sys.exit(BUG)
