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

from ..results import GROUPED
from . import cases
from .cases import Began, Failed, Faulted, Finished, Refused, Request, Wrote

START_S = 60.0
"""Until a process has come to its first case: it imports torch, and CUDA begins."""

END_S = 5.0
"""For a process to be gone after it was killed. One that is stuck in the driver stays."""

_CONTEXT = multiprocessing.get_context("spawn")


@dataclass
class Tally:
    """What came of a run."""

    rows: int = 0
    failures: list[str] = field(default_factory=list)
    """What of ours failed."""
    left_out: str = ""
    """The first case that there was no time for."""
    refused: str = ""
    """Why the device cannot be used."""


Work = Callable[[Connection, Request], None]


def measure(request: Request, say: Callable[[str], None], work: Work = cases.work) -> Tally:
    """Run all cases of a request, in as many processes as it takes.

    Args:
        request: what to measure.
        say: takes the lines about processes that died.
        work: what a process does.
    """
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
    who = ""
    try:
        while True:
            patience = START_S if at is None else at.patience_s
            if not mine.poll(patience):
                end = f"said nothing for {patience:.0f} s"
                break
            news = mine.recv()
            if isinstance(news, Began):
                at = news
            elif isinstance(news, Wrote):
                assert at is not None
                tally.rows += news.rows
                at = at._replace(done=(*at.done, news.phase))
            elif isinstance(news, Failed):
                tally.failures.append(news.what)
            elif isinstance(news, Faulted):
                who = news.who
                end = "ended, for its device reports errors for everything"
                break
            elif isinstance(news, Finished):
                tally.left_out = news.left_out
                return None
            elif isinstance(news, Refused):
                tally.refused = news.why
                return None
    except (EOFError, OSError):  # in the middle of a message, too
        process.join(END_S)
        end = f"died with exit status {process.exitcode}"
    finally:
        process.kill()
        process.join(END_S)
        mine.close()
    return _after(request, at, who, end, tally, say)


def _after(
    request: Request,
    at: Began | None,
    who: str,
    end: str,
    tally: Tally,
    say: Callable[[str], None],
) -> Request | None:
    """What to do after a process that died."""
    title = at.title if at is not None else "before the first case"
    tally.failures.append(f"{title}, {who or cases.UNKNOWN}")
    say(f"FAILED: {title}, {who or cases.UNKNOWN}: the process {end}.")
    if at is None:
        return None
    more = {who} if who else set(GROUPED)
    if more <= set(at.without):  # it died without them, too
        say(f"{title}: left out.")
        return replace(request, start=at.number + 1, without=(), done=())
    without = tuple(sorted({*at.without, *more}))
    say(f"{title}: tried again without {', '.join(without)}.")
    return replace(request, start=at.number, without=without, done=at.done)
