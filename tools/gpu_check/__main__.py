"""``make gpu-check OUT=folder``. Only this file runs if a package is missing; it then says which
one."""

from __future__ import annotations

import faulthandler
import importlib.util
import sys
import time

MISSING_PACKAGE = 4  # The exit status.
ASKING_S = 30  # The time to ask for a GPU. A broken driver may never answer.
NEEDED = ("torch", "numpy", "rich", "typer")


def main() -> None:
    """Run the command line, if it can be imported."""
    began = time.monotonic()
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        line = f"gpu-check: not installed, and needed: {', '.join(missing)}"
        print(line, file=sys.stderr)
        sys.exit(MISSING_PACKAGE)
    from . import check

    check.begun[0] = began
    faulthandler.dump_traceback_later(ASKING_S, exit=True)
    check.no_gpu()
    faulthandler.cancel_dump_traceback_later()
    check.app(prog_name="gpu-check")


if __name__ == "__main__":
    main()
