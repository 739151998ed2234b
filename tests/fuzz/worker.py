"""A process that runs the command line as often as it is asked, under limits of its own.

A line of JSON with arguments comes in, a line with the exit code and what was printed goes out. The
process ends, by a signal, if the code in C crashes or a run takes more than ``HANGS_S`` of
processor time. Memory is limited to what is there after the imports and ``MEMORY``.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout

import torch

from wnkernel.cli.limits import memory_limit
from wnkernel.cli.run import run

HANGS_S = 2.0
MEMORY = 3 << 29
"""Bytes: what reading a small file may take, 1 GiB, and half of that for the rest."""

FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.", "socket.", "pty.")
"""Events that no checkpoint may cause."""


def main() -> None:
    torch.set_num_threads(1)
    out = os.fdopen(os.dup(1), "w")  # what a library prints must not get between
    os.dup2(2, 1)
    caught: list[str] = []
    sys.addaudithook(lambda event, _: caught.append(event) if event.startswith(FORBIDDEN) else None)
    with memory_limit(MEMORY):
        for line in sys.stdin:
            printed = io.StringIO()
            signal.setitimer(signal.ITIMER_PROF, HANGS_S)
            with redirect_stdout(printed), redirect_stderr(printed):
                code = run(json.loads(line))
            signal.setitimer(signal.ITIMER_PROF, 0)
            answer = {"code": code, "printed": printed.getvalue(), "caught": caught}
            print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
