"""Python in a process of its own, for what is decided once per process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PATIENCE_S = 600
"""Seconds after which what is waited for counts as hanging. Nothing takes as long on a machine that
is busy with other things, so that no test fails because of those."""


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python *arguments`` with this checkout importable and some environment variables set."""
    inherited = {k: v for k, v in os.environ.items() if k != "WNKERNEL_BACKEND"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *arguments],
        env=inherited | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
