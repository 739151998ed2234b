"""``make gpu-check OUT=folder``: everything there is to check on a machine with a GPU.

See benchmarks/gpu/check.py. Only this file runs where a package is missing, and says which.
"""

from __future__ import annotations

import importlib.util
import sys

MISSING_PACKAGE = 4
"""The exit status."""

NEEDED = ("torch", "numpy", "rich", "typer")


def main() -> None:
    """The command line, if it can be imported."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        line = f"gpu-check: not installed, and needed: {', '.join(missing)}"
        print(line, file=sys.stderr)
        sys.exit(MISSING_PACKAGE)
    from .gpu.check import app

    app(prog_name="gpu-check")


if __name__ == "__main__":
    main()
