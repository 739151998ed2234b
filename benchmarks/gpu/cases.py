"""The cases of a run, one after the other, in the process that has the device.

A contender that fails is left out and its case is run again, so that the others' rows are there. A
device that fails ends the process, which says where it was.
"""

from __future__ import annotations

import enum
import os
import signal
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

from wnkernel import use_backend
from wnkernel.backends import AUTO, BACKENDS

from ..blame import ContenderError
from ..environment import Environment, environment
from ..results import GROUPED, Result, append_csv, csv_line
from . import copying, flaggems, hosts, single, whole
from .device import is_usable
from .graphs import use_side_stream
from .plan import REAL, TINY, GpuJob, Part, Report, Setting
from .raw import backends, ours

RESULTS = "results.csv"
"""All rows of a run, in its folder."""

UNKNOWN = "nobody knows who"
"""In place of the contender that failed."""


class Section(str, enum.Enum):
    """A part of the benchmark, and what its rows are filed under."""

    COPY = copying.CASE
    SINGLE = single.CASE
    WHOLE = whole.CASE
    HOST = hosts.CASE
    FLAGGEMS = flaggems.CASE


@dataclass(frozen=True)
class Request:
    """What a process is to measure."""

    device: str
    backend: str
    """Of ours; empty for the automatic choice."""
    part: Part
    sections: Collection[Section]
    tiny: bool
    out: Path
    deadline: float
    """No case is begun after this, by ``time.monotonic``."""
    start: int = 0
    """The first case."""
    without: Collection[str] = ()
    """Contenders that the first case is to leave out. All of GROUPED: everything of ours."""
    done: Collection[str] = ()
    """Phases of the first case whose rows are written."""


class Began(NamedTuple):
    """A case is tried, for the first time or again."""

    number: int
    title: str
    patience_s: float
    without: Collection[str]
    done: Collection[str]


class Wrote(NamedTuple):
    """The rows of a phase of the case are on the disk."""

    rows: int
    phase: str


class Failed(NamedTuple):
    """Something of ours."""

    what: str


class Faulted(NamedTuple):
    """The device does not work any more. The process ends."""

    who: str
    """The contender that it was; empty if that is not known."""


class Finished(NamedTuple):
    """Nothing is left to do, or there is no time for it."""

    left_out: str
    """The first case that was not begun."""


class Refused(NamedTuple):
    """The device cannot be used at all."""

    why: str


class DeviceFault(Exception):
    """The device reports errors for everything now."""


def work(connection: Connection, request: Request) -> None:
    """What the process does. It tells the other side of the connection how it goes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt ends the parent, and that ends us
    try:
        where = environment(request.device, None)
    except ValueError as error:
        connection.send(Refused(str(error)))
        return
    automatic = where.backend
    name = request.backend or automatic
    v = torch.empty(1, device=where.device)
    if name not in backends(v):
        why = "; ".join(BACKENDS[name].reasons(v)) or "it has no kernels of ours"
        _say(f"No kernels of ours are measured: {name}: {why}")
    where = replace(where, backend=name)
    use_side_stream(where.device)
    _say(
        f"{where.device_name}, torch {where.torch}, triton {where.triton or 'not installed'}, "
        f"wnkernel backend {where.backend!r}, commit {where.commit or 'unknown'}"
    )
    # what is asked for by name does not go the short ways that the automatic choice has
    forced = name != automatic and not BACKENDS[name].reasons(v)
    with use_backend(name if forced else AUTO):
        _run(connection, request, where)


def _run(connection: Connection, request: Request, where: Environment) -> None:
    def fail(what: str) -> None:
        _say(f"FAILED: {what}")
        connection.send(Failed(what))

    jobs = jobs_of(request, where, fail)
    started = time.monotonic()
    own = (*GROUPED, ours(where.backend))
    without, done = request.without, request.done
    if set(GROUPED) <= set(without):
        without = {*own, *without}
    for k in range(request.start, len(jobs)):
        if time.monotonic() > request.deadline:
            connection.send(Finished(jobs[k].title))
            return
        _say(f"[{time.monotonic() - started:6.1f} s] {jobs[k].title}")

        def begin(out: Collection[str], done: Collection[str], k: int = k) -> None:
            job = jobs[k]
            connection.send(Began(k, job.title, job.patience_s, tuple(out), tuple(done)))

        def write(found: list[Result]) -> None:
            _write(found, request.out / RESULTS)
            connection.send(Wrote(len(found), found[0].phase))

        try:
            run_job(jobs[k], without, done, own, where.device, begin, write, fail)
        except DeviceFault as fault:
            connection.send(Faulted(str(fault)))
            connection.close()
            os._exit(1)  # what CUDA does when a process with a fault ends in order can hang
        without, done = (), ()
    connection.send(Finished(""))


def jobs_of(request: Request, where: Environment, fail: Report) -> list[GpuJob]:
    """All cases, in their order, which is the same in every process."""
    plan = TINY if request.tiny else REAL
    setting = Setting(plan, request.part, where, _say, fail)
    makers: dict[Section, Callable[[Setting], list[GpuJob]]] = {
        Section.COPY: copying.jobs,
        Section.SINGLE: single.jobs,
        Section.WHOLE: whole.jobs,
        Section.HOST: hosts.jobs,
        Section.FLAGGEMS: flaggems.jobs,  # last, for it takes its time
    }
    return [job for s, make in makers.items() if s in request.sections for job in make(setting)]


def run_job(
    job: GpuJob,
    without: Collection[str],
    done: Collection[str],
    own: Collection[str],
    device: torch.device,
    begin: Callable[[Collection[str], Collection[str]], None],
    write: Callable[[list[Result]], None],
    fail: Callable[[str], None],
) -> None:
    """Run a case until it succeeds without those that fail.

    Args:
        job: the case.
        without: contenders to leave out from the beginning.
        done: phases whose rows were written before.
        own: the names of ours: all of them are left out where it is not known who failed.
        device: where it runs.
        begin: called before each try, with the contenders that are left out, and the phases done.
        write: takes the rows of a phase.
        fail: takes what of ours failed.

    Raises:
        DeviceFault: the device does not work any more. Its text is the contender, if it is known.
    """
    out, phases = sorted(without), list(done)
    while True:
        begin(out, phases)
        try:
            for found in job.run(out):
                if found and found[0].phase not in phases:
                    write(found)
                    phases.append(found[0].phase)
            return
        except Exception as error:  # a benchmark that stops at the first bug shows only that one
            who = error.who if isinstance(error, ContenderError) else ""
            _say(f"{job.title}: {type(error).__name__}: {error}")
            _say("".join(traceback.format_exception(error)))
            del error
        if not is_usable(device):
            raise DeviceFault(who)
        more = {who} if who else set(own)
        if who in own or not who:
            fail(f"{job.title}, {who or UNKNOWN}")
        if more <= set(out):  # it fails without them, too
            return
        out = sorted(more.union(out))


def _write(found: list[Result], path: Path) -> None:
    try:
        append_csv(found, path)
    except OSError as error:
        _say(f"{path} cannot be written: {error.strerror}. These are its rows:")
        for r in found:
            _say(csv_line(r).rstrip())


def _say(line: str) -> None:
    print(line, flush=True)
