"""Which lines and branches the tests run, of Python and of C++: ``make coverage``.

In a copy of the working tree, as tests/instrumented.py makes it. Processes that tests start are
counted as well. The kernels are one source, compiled for every instruction set and pair of dtypes:
a line counts as run where one of those was, a branch for each of them, and so the tests of values
run with the narrower sets as well. Arguments are for pytest.
"""

from __future__ import annotations

import os
import subprocess
import sys

from .bits import SETS
from .instrumented import build

OF_KERNELS = [f"tests/core/test_{name}.py" for name in ("values", "gradients", "lists", "norms")]
GCOVR = (
    *("--filter", "csrc/", "--exclude", "csrc/cuda/", "--merge-lines"),
    *("--exclude-throw-branches", "--exclude-unreachable-branches"),  # the compiler's own
)


def main() -> int:
    tree = build("coverage")
    for count in tree.rglob("*.gcda"):
        count.unlink()
    environment = os.environ | {"OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(tree)}

    def run(*command: str, **more: str) -> int:
        command = (sys.executable, "-m", *command)
        done = subprocess.run(command, cwd=tree, env=environment | more, check=False)
        return done.returncode

    run("coverage", "erase")
    status = run("coverage", "run", "-m", "pytest", "-n", "2", *sys.argv[1:])
    for used in SETS[:-1]:
        tests = (*OF_KERNELS, "-q", "-k", "not triton and not eager")
        status |= run("pytest", *tests, WNKERNEL_CPU_ISA=used)
    run("coverage", "combine", "-q")
    run("coverage", "report")
    run("gcovr", *GCOVR)
    run("gcovr", *GCOVR, "--txt-metric", "branch")
    return status


if __name__ == "__main__":
    sys.exit(main())
