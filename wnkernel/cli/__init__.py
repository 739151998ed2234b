"""The command line. Nothing else in ``wnkernel`` imports it. Where the packages that it needs are
missing, only this file runs, and what the benchmarks use of it: exact, load and timing."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

MISSING_PACKAGE = 2
"""An exit code; the others are in errors.py."""

NEEDED = ("typer", "rich", "safetensors")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, or say what to install; ends the process.

    Args:
        arguments: those of the process if not given.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"wnkernel: the command line needs {', '.join(missing)}: pip install 'wnkernel[cli]'; "
            "python -m wnkernel alone prints the facts without",
            file=sys.stderr,
        )
        sys.exit(MISSING_PACKAGE)
    from .run import run

    sys.exit(run(sys.argv[1:] if arguments is None else arguments))
