"""Builds for the cards of this machine; the last line says how that went.

``python -m tools.gpu_check.build``. Exit status 1: there is no module, or the module has no CUDA
kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from benchmarks.environment import ROOT

ASK = """if True:
    import json
    from wnkernel import native
    print(json.dumps([native.load_error(), native.BUILD_INFO]))
"""
"""Runs in a process of its own: a module that failed to load before the build would stay unloaded.
"""


def main() -> int:
    """Run setup.py, in a mode in which every error is an error."""
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    built = subprocess.run(build, cwd=ROOT, env={**os.environ, "WNKERNEL_BUILD": "cuda"})
    if built.returncode:
        print(f"setup.py ended with status {built.returncode}")
        return 1
    asked = subprocess.run([sys.executable, "-c", ASK], cwd=ROOT, capture_output=True, text=True)
    if asked.returncode:
        print(asked.stderr.strip())
        return 1
    error, info = json.loads(asked.stdout.splitlines()[-1])
    print(error or f"built: {info}", flush=True)
    return int(bool(error) or "cuda" not in info["devices"])


if __name__ == "__main__":
    sys.exit(main())
