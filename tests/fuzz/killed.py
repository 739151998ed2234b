"""Conversions that are killed at a random line of ours, in copies of a process that has imported
all of it.

``python -m tests.fuzz.killed FOLDER COUNT SEED ARGUMENTS...`` runs the command line once to its end
and COUNT times until it is killed, each time on the files that FOLDER has, and prints as JSON for
each run where that was, and the files of the folder. The function is drawn first, then one of its
lines, for most lines that run are in a few loops.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from wnkernel import cli
from wnkernel.cli import output, run

OURS = str(Path(cli.__file__).parent)


class Lines:
    """Notes the functions of the lines that run in ``wnkernel.cli``, and kills the process at one
    of them, by its number."""

    def __init__(self, last: int | None) -> None:
        self.functions: list[str] = []
        self._last = last

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(OURS):
            return None
        if event == "line":
            if len(self.functions) == self._last:
                os.kill(os.getpid(), signal.SIGKILL)
            self.functions.append(f"{Path(code.co_filename).name}:{code.co_name}")
        return self


def contents(folder: Path) -> dict[str, str]:
    """All files, hidden ones too, by hashes."""
    files = (path for path in folder.iterdir() if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def in_a_copy(arguments: list[str], last: int | None = None) -> tuple[int, list[str]]:
    """How a run ended, and the functions of its lines if it came to its end."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        lines = Lines(last)
        sys.settrace(lines)
        code = run.run(arguments)
        sys.settrace(None)
        with open(write, "w") as pipe:
            json.dump(lines.functions, pipe)
        os._exit(code)
    os.close(write)
    with open(read) as pipe:
        functions = json.loads(pipe.read() or "[]")
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), functions


def main(folder: Path, count: int, seed: int, arguments: list[str]) -> list[dict[str, Any]]:
    torch.set_num_threads(1)  # the threads of a process are not there in what it forks
    output.CHUNK = 1 << 10
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    def restore() -> None:
        for path in folder.iterdir():
            if path not in before:
                path.unlink()
        for path, content in before.items():
            if path.read_bytes() != content:
                path.write_bytes(content)

    code, functions = in_a_copy(arguments)
    found = [{"code": code, "in": "the end", "files": contents(folder)}]
    chance, lines = random.Random(seed), {}
    for number, function in enumerate(functions):
        lines.setdefault(function, []).append(number)
    for _ in range(count):
        restore()
        function = chance.choice(list(lines))
        code, _ = in_a_copy(arguments, chance.choice(lines[function]))
        found.append({"code": code, "in": function, "files": contents(folder)})
    return found


if __name__ == "__main__":
    folder, count, seed, *arguments = sys.argv[1:]
    print(json.dumps(main(Path(folder), int(count), int(seed), arguments)))
