"""Hardware counters of eight launches of the CUDA kernels: ``python -m tools.gpu_check.profiling
ncu.txt 'a card'``. Without arguments it only makes the launches: forward and backward in float32,
of rows, of a split strip (two launches per direction) and of a model as a list.

The report goes to a file. The exit status is 1 if it lacks a launch.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

import wnkernel
from benchmarks.gpu.raw import inputs
from benchmarks.shapes import LayerCase, weight_list
from wnkernel.functional import weight_norms

from .visit import PROFILER, tool

LAUNCHES = 8
LISTS = (
    [LayerCase((4096, 4096), 0, "", "Linear")],
    [LayerCase((1024, 64, 128), 2, "", "Conv1d")],
    weight_list("HiFi-GAN-V1"),
)
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis", "WarpStateStats")
KERNEL = "weight_norm_kernel"
LAST_LINES = 5


def launch(device: str = "cuda") -> None:
    """Make the launches once."""
    with wnkernel.use_backend("cuda" if device == "cuda" else wnkernel.backends.AUTO):
        for cases in LISTS:
            sets = [inputs(c, torch.float32, torch.device(device), k) for k, c in enumerate(cases)]
            vs, gs = ([t.requires_grad_() for t in (getattr(s, x) for s in sets)] for x in "vg")
            ws = weight_norms(vs, gs, [c.dim for c in cases])
            torch.autograd.grad(ws, [*vs, *gs], [s.grad_w for s in sets])
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{sum(map(len, LISTS))} weight norms, forward and backward")


def command(report: Path) -> list[str]:
    """Return the command, which does not change the clock of the card."""
    words = [tool(PROFILER), "--clock-control", "none", "--force-overwrite"]
    words += ["--kernel-name", f"regex:{KERNEL}", "--launch-count", str(LAUNCHES)]
    words += [word for section in SECTIONS for word in ("--section", section)]
    return [*words, "--log-file", str(report), sys.executable, "-m", "tools.gpu_check.profiling"]


def main(report: Path, about: str) -> int:
    """Profile, and say how many launches are in the report, or which message it has instead."""
    done = subprocess.run(command(report), check=False)
    with report.open("a") as file:
        file.write(f"\n{about}\n")
    lines = report.read_text(errors="replace").splitlines()
    found = sum(KERNEL in line and not line.startswith("==") for line in lines)
    failed = bool(done.returncode) or found < LAUNCHES
    if failed:
        print(*lines[-LAST_LINES:], sep="\n")
    print(f"{found} of {LAUNCHES} launches are in the report", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]) if sys.argv[1:] else launch())
