"""Runs the cases one after the other in a process that may die. A contender that faults, hangs or
crashes loses one case, no more.

If a contender fails, its case runs again without it, so that the others have rows. After a fault
CUDA refuses everything until the process ends. So the process with the device starts again with the
case in which it died, without the contender that ran. If that process dies, too, the next one
continues with the next case.
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
UNKNOWN = "nobody knows who"  # The name of a contender that failed, if it is unknown.
START_S = 60.0  # Until a process begins its first case: it imports torch, and CUDA starts.
END_S = 5.0  # Until a killed process is gone. A process that is stuck in the driver stays.
_CONTEXT = multiprocessing.get_context("spawn")


class Section(str, enum.Enum):
    """A part of the benchmark, and the value of its rows' case."""

    COPY = single.COPYING
    SINGLE = single.SINGLE
    WHOLE = whole.WHOLE
    HOST = single.HOST
    FLAGGEMS = single.RIVAL


@dataclass(frozen=True)
class Request:
    """The work of one process."""

    device: str
    backend: str  # A backend of ours; empty means the automatic choice.
    part: Part
    sections: Collection[Section]
    tiny: bool
    out: Path
    deadline: float  # By ``time.monotonic``. No case begins after this.
    start: int = 0  # The number of the first case.
    without: Collection[str] = ()
    """Contenders that the first case leaves out. All of OWN stands for everything of ours."""
    done: Collection[str] = ()  # Phases of the first case whose rows are already written.


class Began(NamedTuple):
    """A case begins, for the first time or again."""

    number: int
    title: str
    patience_s: float
    without: list[str]
    done: list[str]


class Wrote(NamedTuple):
    """The rows of one phase of the case are on the disk."""

    rows: int
    phase: str


class Failed(NamedTuple):
    """Something of ours failed."""

    what: str


class Faulted(NamedTuple):
    """The device does not work any more, so the process ends. The name is empty if the contender is
    unknown."""

    who: str


class Finished(NamedTuple):
    """The process finished all cases, or tells why not."""

    left_out: str = ""  # The first case for which no time was left.
    refused: str = ""  # The reason why the device cannot be used at all.


Work = Callable[[Connection, Request], None]


def work(connection: Connection, request: Request) -> None:
    """The function of the process. It reports its progress to the other side of the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt ends the parent, which ends us
    try:
        where = environment(request.device, None)
    except ValueError as error:
        connection.send(Finished(refused=str(error)))
        return
    name = request.backend or where.backend
    v = torch.empty(1, device=where.device)
    if name not in backends(v):
        why = "; ".join(BACKENDS[name].reasons(v)) or "it has no kernels of ours"
        _say(f"No kernels of ours are measured: {name}: {why}")
    # A backend that is asked for by name does not take the short ways of the automatic choice.
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
        while True:
            connection.send(Began(k, job.title, job.patience_s, sorted(without), [*done]))
            failed = _try(job, without, done, connection, request.out)
            if failed is None:
                break
            if not is_usable(where.device):
                connection.send(Faulted(failed))
                connection.close()
                os._exit(1)  # an orderly end after a fault can hang in CUDA
            if failed == "" or failed in own:
                fail(f"{job.title}, {failed or UNKNOWN}")
            more = {failed} if failed else own  # if it is unknown, all of ours are left out
            if more <= without:  # it fails without them, too
                break
            without |= more
        without, done = set(), []
    connection.send(Finished())


def jobs_of(request: Request, where: Environment, fail: Report) -> list[GpuJob]:
    """Return all cases in their order, which is the same in every process."""
    setting = Setting(TINY if request.tiny else REAL, request.part, where, _say, fail)
    makers: dict[Section, Callable[[Setting], list[GpuJob]]] = {
        Section.COPY: single.copy_jobs,
        Section.SINGLE: single.jobs,
        Section.WHOLE: whole.jobs,
        Section.HOST: single.host_jobs,
        Section.FLAGGEMS: single.rival_jobs,  # runs last, because it takes long
    }
    return [job for s, make in makers.items() if s in request.sections for job in make(setting)]


def _try(
    job: GpuJob, without: Collection[str], done: list[str], connection: Connection, folder: Path
) -> str | None:
    """Run a case, write the rows of phases that are not done, and add these phases to ``done``.
    Return the contender that failed, empty if it is unknown, and None if all is well."""
    try:
        for found in job.run(sorted(without)):
            if found and found[0].phase not in done:
                _write(found, folder / RESULTS)
                connection.send(Wrote(len(found), found[0].phase))
                done.append(found[0].phase)
        return None
    except Exception as error:  # the benchmark must show more than the first bug
        _say(f"{job.title}: {type(error).__name__}: {error}")
        _say("".join(traceback.format_exception(error)))
        return error.who if isinstance(error, ContenderError) else ""


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
    """The result of a run."""

    rows: int = 0
    failures: list[str] = field(default_factory=list)  # The failures of ours.
    left_out: str = ""  # The first case for which no time was left.
    refused: str = ""  # The reason why the device cannot be used.


def measure(request: Request, say: Report, work: Work = work) -> Tally:
    """Run all cases of a request in as many processes as necessary; report which of them died."""
    tally = Tally()
    following: Request | None = request
    while following is not None:
        following = _one_process(following, tally, say, work)
    return tally


def _one_process(request: Request, tally: Tally, say: Report, work: Work) -> Request | None:
    """Run a process to its end. If it died, return the rest of the request."""
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
                case Finished(left_out, refused):
                    tally.left_out, tally.refused = left_out, refused
                    return None
    except (EOFError, OSError):  # also in the middle of a message
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
