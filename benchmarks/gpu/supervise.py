"""Measures in a process that may die: whoever faults, hangs or crashes loses one case, no more.

After a fault CUDA refuses everything until its process ends. So the process that has the device is
started again, with the case that it died in, and without the contender that was at it; and if that
dies, too, with the next case.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection

from ..contenders import OWN
from . import cases
from .cases import Began, Failed, Faulted, Finished, Refused, Request, Wrote

START_S = 60.0  # Until a process has come to its first case: it imports torch, and CUDA begins.
END_S = 5.0  # For a process to be gone after it was killed. One that is stuck in the driver stays.
_CONTEXT = multiprocessing.get_context("spawn")

Work = Callable[[Connection, Request], None]


@dataclass
class Tally:
    """What came of a run."""

    rows: int = 0
    failures: list[str] = field(default_factory=list)  # What of ours failed.
    left_out: str = ""  # The first case that there was no time for.
    refused: str = ""  # Why the device cannot be used.


def measure(request: Request, say: Callable[[str], None], work: Work = cases.work) -> Tally:
    """Run all cases of a request, in as many processes as it takes; say which of them died."""
    tally = Tally()
    following: Request | None = request
    while following is not None:
        following = _one_process(following, tally, say, work)
    return tally


def _one_process(
    request: Request, tally: Tally, say: Callable[[str], None], work: Work
) -> Request | None:
    """Run a process to its end. Returns what is left to do after one that died."""
    mine, theirs = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=work, args=(theirs, request), daemon=True)
    process.start()
    theirs.close()
    at: Began | None = None
    who = end = ""
    try:
        while not end:
            patience = START_S if at is None else at.patience_s
            if not mine.poll(patience):
                end = f"said nothing for {patience:.0f} s"
                break
            match mine.recv():
                case Began() as at:
                    pass
                case Wrote(rows, phase):
                    tally.rows += rows
                    at = at._replace(done=[*at.done, phase])
                case Failed(what):
                    tally.failures.append(what)
                case Faulted(who):
                    end = "ended, for its device reports errors for everything"
                case Finished(left_out):
                    tally.left_out = left_out
                    return None
                case Refused(why):
                    tally.refused = why
                    return None
    except (EOFError, OSError):  # in the middle of a message, too
        process.join(END_S)
        end = f"died with exit status {process.exitcode}"
    finally:
        process.kill()
        process.join(END_S)
        mine.close()
    title = at.title if at is not None else "before the first case"
    tally.failures.append(f"{title}, {who or cases.UNKNOWN}")
    say(f"FAILED: {title}, {who or cases.UNKNOWN}: the process {end}.")
    if at is None:
        return None
    more = {who} if who else set(OWN)
    if more <= set(at.without):  # it died without them, too
        say(f"{title}: left out.")
        return replace(request, start=at.number + 1, without=(), done=())
    without = tuple(sorted({*at.without, *more}))
    say(f"{title}: tried again without {', '.join(without)}.")
    return replace(request, start=at.number, without=without, done=at.done)
