"""Which lines and branches the tests run, of Python and of C++: ``make coverage``.

In a copy of the working tree, as tests/instrumented.py makes it. Processes that tests start are
counted as well. Arguments are for pytest.
"""

from __future__ import annotations

import os
import subprocess
import sys

from .instrumented import build


def main() -> int:
    tree = build("coverage")
    for count in tree.rglob("*.gcda"):
        count.unlink()
    environment = os.environ | {"OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(tree)}

    def run(*command: str) -> int:
        command = (sys.executable, "-m", *command)
        return subprocess.run(command, cwd=tree, env=environment, check=False).returncode

    run("coverage", "erase")
    status = run("coverage", "run", "-m", "pytest", "-n", "2", *sys.argv[1:])
    run("coverage", "combine", "-q")
    run("coverage", "report")
    run("gcovr", "--filter", "csrc/", "--exclude", "csrc/cuda/", "--print-summary")
    return status


if __name__ == "__main__":
    sys.exit(main())
