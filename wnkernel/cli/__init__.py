"""The command line. Nothing else in ``wnkernel`` imports it. This file runs even if packages of the
command line are missing. So do exact.py, load.py and timing.py, which the benchmarks use."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

MISSING_PACKAGE = 2
"""The exit code if a package is missing. errors.py has the other exit codes."""

NEEDED = ("typer", "rich", "safetensors")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, or say which packages to install, and then exit the process.

    Args:
        arguments: the arguments of the command line; by default those of the process.
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
