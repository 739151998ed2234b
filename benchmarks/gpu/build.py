"""Build what can be built here, and say in the last line what came of it.

``python -m benchmarks.gpu.build``. Exit status 1: there is a compiler, and still no module.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

ASK = "from wnkernel import _ops; print(_ops.load_error() or _ops.BUILD_INFO)"
"""In a process of its own: a module that was loaded before it was built stays unloaded."""


def main() -> int:
    """Runs setup.py if there is a C++ compiler."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        print(f"Nothing to build: no C++ compiler ({compiler}). The package is Python only.")
        return 0
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    built = subprocess.run(build, cwd=ROOT, check=False)
    asked = subprocess.run(
        [sys.executable, "-c", ASK], cwd=ROOT, capture_output=True, text=True, check=False
    )
    answer = (asked.stdout.strip() or asked.stderr.strip()).splitlines()[-1:]
    print(*answer, flush=True)
    return int(built.returncode != 0 or not answer or not answer[0].startswith("{"))


if __name__ == "__main__":
    sys.exit(main())
