"""The cases of a run, one after the other, in a process that may die: whoever faults, hangs or
crashes loses one case, no more.

A contender that fails is left out and its case is run again, so that the others' rows are there.
After a fault CUDA refuses everything until its process ends. So the process that has the device is
started again, with the case that it died in, and without the contender that was at it; and if that
dies, too, with the next case.
"""

from __future__ import annotations

import enum
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

from wnkernel import use_backend
from wnkernel.backends import AUTO, BACKENDS

from ..contenders import OWN
from ..environment import Environment, environment
from ..results import Result, append_csv, csv_text
from ..timing import ContenderError
from . import single, whole
from .plan import REAL, TINY, GpuJob, Part, Report, Setting
from .raw import backends, ours
from .timing import is_usable, use_side_stream

RESULTS = "results.csv"  # All rows of a run, in its folder.
UNKNOWN = "nobody knows who"  # In place of the contender that failed.
START_S = 60.0  # Until a process has come to its first case: it imports torch, and CUDA begins.
END_S = 5.0  # For a process to be gone after it was killed. One that is stuck in the driver stays.
_CONTEXT = multiprocessing.get_context("spawn")


class Section(str, enum.Enum):
    """A part of the benchmark, and what its rows are filed under."""

    COPY = single.COPYING
    SINGLE = single.SINGLE
    WHOLE = whole.WHOLE
    HOST = single.HOST
    FLAGGEMS = single.RIVAL


@dataclass(frozen=True)
class Request:
    """What a process is to measure."""

    device: str
    backend: str  # Of ours; empty for the automatic choice.
    part: Part
    sections: Collection[Section]
    tiny: bool
    out: Path
    deadline: float  # No case is begun after this, by ``time.monotonic``.
    start: int = 0  # The first case.
    without: Collection[str] = ()
    """Contenders that the first case is to leave out. All of OWN: everything of ours."""
    done: Collection[str] = ()  # Phases of the first case whose rows are written.


class Began(NamedTuple):
    """A case is tried, for the first time or again."""

    number: int
    title: str
    patience_s: float
    without: list[str]
    done: list[str]


class Wrote(NamedTuple):
    """The rows of a phase of the case are on the disk."""

    rows: int
    phase: str


class Failed(NamedTuple):
    """Something of ours."""

    what: str


class Faulted(NamedTuple):
    """The device does not work any more. The process ends. Empty: it is not known who it was."""

    who: str


class Finished(NamedTuple):
    """Nothing is left to do, or no time for the first case that was not begun."""

    left_out: str


class Refused(NamedTuple):
    """The device cannot be used at all."""

    why: str


class DeviceFault(Exception):
    """The device reports errors for everything now. Its text is the contender, if it is known."""


Work = Callable[[Connection, Request], None]


def work(connection: Connection, request: Request) -> None:
    """What the process does. It tells the other side of the connection how it goes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt ends the parent, and that ends us
    try:
        where = environment(request.device, None)
    except ValueError as error:
        connection.send(Refused(str(error)))
        return
    name = request.backend or where.backend
    v = torch.empty(1, device=where.device)
    if name not in backends(v):
        why = "; ".join(BACKENDS[name].reasons(v)) or "it has no kernels of ours"
        _say(f"No kernels of ours are measured: {name}: {why}")
    # what is asked for by name does not go the short ways that the automatic choice has
    forced = name != where.backend and not BACKENDS[name].reasons(v)
    where = replace(where, backend=name)
    use_side_stream(where.device)
    _say(
        f"{where.device_name}, torch {where.torch}, triton {where.triton or 'not installed'}, "
        f"wnkernel backend {where.backend!r}, commit {where.commit or 'unknown'}"
    )
    with use_backend(name if forced else AUTO):
        _run(connection, request, where)


def _run(connection: Connection, request: Request, where: Environment) -> None:
    def fail(what: str) -> None:
        _say(f"FAILED: {what}")
        connection.send(Failed(what))

    jobs = jobs_of(request, where, fail)
    started = time.monotonic()
    own = {*OWN, ours(where.backend)}
    without, done = set(request.without), list(request.done)
    if set(OWN) <= without:
        without |= own
    for k, job in enumerate(jobs[request.start :], request.start):
        if time.monotonic() > request.deadline:
            connection.send(Finished(job.title))
            return
        _say(f"[{time.monotonic() - started:6.1f} s] {job.title}")
        trying = True
        while trying:
            connection.send(Began(k, job.title, job.patience_s, sorted(without), [*done]))
            try:
                trying = _try(job, without, done, own, where.device, connection, request.out, fail)
            except DeviceFault as fault:
                connection.send(Faulted(str(fault)))
                connection.close()
                os._exit(1)  # what CUDA does when a process with a fault ends in order can hang
        without, done = set(), []
    connection.send(Finished(""))


def jobs_of(request: Request, where: Environment, fail: Report) -> list[GpuJob]:
    """All cases, in their order, which is the same in every process."""
    setting = Setting(TINY if request.tiny else REAL, request.part, where, _say, fail)
    makers: dict[Section, Callable[[Setting], list[GpuJob]]] = {
        Section.COPY: single.copy_jobs,
        Section.SINGLE: single.jobs,
        Section.WHOLE: whole.jobs,
        Section.HOST: single.host_jobs,
        Section.FLAGGEMS: single.rival_jobs,  # last, for it takes its time
    }
    return [job for s, make in makers.items() if s in request.sections for job in make(setting)]


def _try(
    job: GpuJob,
    without: set[str],
    done: list[str],
    own: set[str],
    device: torch.device,
    connection: Connection,
    folder: Path,
    fail: Report,
) -> bool:
    """Run a case. Whether it is to be tried again, without whoever failed: all of ours, if that is
    not known. Both lists are added to.

    Raises:
        DeviceFault: the device does not work any more.
    """
    try:
        for found in job.run(sorted(without)):
            if found and found[0].phase not in done:
                _write(found, folder / RESULTS)
                connection.send(Wrote(len(found), found[0].phase))
                done.append(found[0].phase)
        return False
    except Exception as error:  # a benchmark that stops at the first bug shows only that one
        who = error.who if isinstance(error, ContenderError) else ""
        _say(f"{job.title}: {type(error).__name__}: {error}")
        _say("".join(traceback.format_exception(error)))
    if not is_usable(device):
        raise DeviceFault(who)
    more = {who} if who else own
    if who in own or not who:
        fail(f"{job.title}, {who or UNKNOWN}")
    if more <= without:  # it fails without them, too
        return False
    without |= more
    return True


def _write(found: list[Result], path: Path) -> None:
    try:
        append_csv(found, path)
    except OSError as error:
        _say(f"{path} cannot be written: {error.strerror}. These are its rows:")
        _say(csv_text(found).rstrip())


def _say(line: str) -> None:
    print(line, flush=True)


@dataclass
class Tally:
    """What came of a run."""

    rows: int = 0
    failures: list[str] = field(default_factory=list)  # What of ours failed.
    left_out: str = ""  # The first case that there was no time for.
    refused: str = ""  # Why the device cannot be used.


def measure(
    request: Request, say: Callable[[str], None], work: Callable[[Connection, Request], None] = work
) -> Tally:
    """Run all cases of a request, in as many processes as it takes; say which of them died."""
    tally = Tally()
    following: Request | None = request
    while following is not None:
        following = _one_process(following, tally, say, work)
    return tally


def _one_process(
    request: Request,
    tally: Tally,
    say: Callable[[str], None],
    work: Callable[[Connection, Request], None],
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
    tally.failures.append(f"{title}, {who or UNKNOWN}")
    say(f"FAILED: {title}, {who or UNKNOWN}: the process {end}.")
    if at is None:
        return None
    more = {who} if who else set(OWN)
    if more <= set(at.without):  # it died without them, too
        say(f"{title}: left out.")
        return replace(request, start=at.number + 1, without=(), done=())
    without = tuple(sorted({*at.without, *more}))
    say(f"{title}: tried again without {', '.join(without)}.")
    return replace(request, start=at.number, without=without, done=at.done)
