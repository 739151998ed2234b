"""The command line in a process that may crash, for files that nobody should trust."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import event

from ..processes import PATIENCE_S, ROOT

DONE, NOTHING, DAMAGED, CANNOT_WRITE, NO_MEMORY = 0, 1, 3, 4, 6
"""How ``wnkernel convert`` may end, whatever is in a file."""


@dataclass
class Reader:
    """Files of one folder, read by a worker."""

    folder: Path
    _process: subprocess.Popen[str] | None = field(default=None, init=False)

    def close(self) -> None:
        if self._process:
            self._process.communicate()
            self._process = None

    def check(self, source: Path, to: str, suffix: str) -> None:
        """Convert a file of the folder: it ends well or with one line, and leaves nothing behind.

        Raises:
            AssertionError: it does not.
        """
        before = {path: path.read_bytes() for path in self.folder.iterdir()}
        target = self.folder / f"out{suffix}"
        ended = self._run(["convert", str(source), str(target), "--to", to])
        code, printed = ended["code"], ended["printed"]
        event(f"exit code {code}")
        assert code in (DONE, NOTHING, DAMAGED, CANNOT_WRITE, NO_MEMORY), printed
        assert not ended["caught"], ended
        after = {path: path.read_bytes() for path in self.folder.iterdir()}
        written = [after.pop(path) for path in list(after) if path not in before]
        assert after == before
        if code == DONE:
            assert written
            again = self._run(["convert", str(target), "--to", to, "--dry-run"])
            assert again["code"] in (DONE, NOTHING), again["printed"]
            for path in self.folder.iterdir():
                if path not in before:
                    path.unlink()
        else:
            assert not written
            (line,) = printed.splitlines()
            assert line.startswith("wnkernel: ")

    def _run(self, arguments: list[str]) -> dict[str, Any]:
        if self._process is None:
            path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fuzz.worker"],
                env=os.environ | {"PYTHONPATH": path},
                cwd=self.folder.parent,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        self._process.stdin.write(json.dumps(arguments) + "\n")
        self._process.stdin.flush()
        if select.select([self._process.stdout], [], [], PATIENCE_S)[0] and (
            line := self._process.stdout.readline()
        ):
            return json.loads(line)
        process, self._process = self._process, None
        process.kill()
        raise AssertionError(f"the process ended, or waits for something: {process.wait()}")
