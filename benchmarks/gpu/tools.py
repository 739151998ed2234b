"""Where the tools of CUDA are."""

from __future__ import annotations

import glob
import os
import shutil

SANITIZER, PROFILER = "compute-sanitizer", "ncu"


def tool(name: str) -> str:
    """The path of a tool; empty if it is nowhere."""
    homes = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", "")]
    folders = [os.path.join(home, "bin") for home in homes if home]
    for pattern in (
        "/usr/local/cuda*/bin",
        f"/usr/local/cuda*/{name}",
        "/opt/nvidia/nsight-compute/*",
    ):
        folders += sorted(glob.glob(pattern), reverse=True)
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders)) or ""
