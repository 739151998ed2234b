"""Hardware counters of eight launches: ``python -m benchmarks.gpu.profiling ncu.txt 'a card'``.

The report goes to a file. Exit status: 1 if it has not all of them.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from . import launches
from .tools import PROFILER, tool

REPORT = "ncu.txt"
"""In the folder of results."""

SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis", "WarpStateStats")

KERNEL = "weight_norm_kernel"

LAST_LINES = 5


def command(report: Path) -> list[str]:
    """With the clock that the card has anyway."""
    words = [tool(PROFILER), "--clock-control", "none", "--force-overwrite"]
    words += ["--kernel-name", f"regex:{KERNEL}", "--launch-count", str(launches.LAUNCHES)]
    words += [word for section in SECTIONS for word in ("--section", section)]
    words += ["--log-file", str(report)]
    return [*words, sys.executable, "-m", "benchmarks.gpu.launches"]


def main(report: Path, about: str) -> int:
    """Profiles, and says how many launches are in the report, or what it says instead.

    Args:
        report: the file.
        about: the device and the commit, for its last line.
    """
    done = subprocess.run(command(report), check=False)
    with report.open("a") as file:
        file.write(f"\n{about}\n")
    lines = report.read_text(errors="replace").splitlines() if report.exists() else []
    found = sum(KERNEL in line and not line.startswith("==") for line in lines)
    if done.returncode or found < launches.LAUNCHES:
        print(*lines[-LAST_LINES:], sep="\n")
    print(f"{found} of {launches.LAUNCHES} launches are in the report", flush=True)
    return int(bool(done.returncode) or found < launches.LAUNCHES)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
