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
from .plan import REAL, TINY, GpuJob, Part, Setting
from .raw import backends, ours

RESULTS = "results.csv"
"""All rows of a run, in its folder."""


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
    """Contenders that the first case is to leave out."""


class Began(NamedTuple):
    """A case is tried, for the first time or again."""

    number: int
    title: str
    without: Collection[str]


class Ended(NamedTuple):
    """A case is over."""

    rows: int
    failures: Collection[str]
    """What of ours failed."""


class Faulted(NamedTuple):
    """The device does not work any more. The process ends."""

    who: str
    """The contender that it was; empty if that is not known."""


class Finished(NamedTuple):
    """Nothing is left to do, or there is no time for it."""

    cases: int
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
    name = request.backend or where.backend
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
    with use_backend(AUTO if BACKENDS[name].reasons(v) else name):
        _run(connection, request, where)


def _run(connection: Connection, request: Request, where: Environment) -> None:
    jobs = jobs_of(request, where)
    started = time.monotonic()
    own = (*GROUPED, ours(where.backend))
    without = request.without
    for k in range(request.start, len(jobs)):
        if time.monotonic() > request.deadline:
            connection.send(Finished(len(jobs), jobs[k].title))
            return
        _say(f"[{time.monotonic() - started:6.1f} s] {jobs[k].title}")

        def begin(without: Collection[str], k: int = k) -> None:
            connection.send(Began(k, jobs[k].title, tuple(without)))

        try:
            found, failures = run_job(jobs[k], without, own, where.device, begin)
        except DeviceFault as fault:
            connection.send(Faulted(str(fault)))
            connection.close()
            os._exit(1)  # what CUDA does when a process with a fault ends in order can hang
        _write(found, request.out / RESULTS)
        connection.send(Ended(len(found), failures))
        without = ()
    connection.send(Finished(len(jobs), ""))


def jobs_of(request: Request, where: Environment) -> list[GpuJob]:
    """All cases, in their order, which is the same in every process."""
    plan = TINY if request.tiny else REAL
    setting = Setting(plan, request.part, where, _say)
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
    own: Collection[str],
    device: torch.device,
    begin: Callable[[Collection[str]], None],
) -> tuple[list[Result], list[str]]:
    """Run a case until it succeeds without those that fail.

    Args:
        job: the case.
        without: contenders to leave out from the beginning.
        own: the names of ours: all of them are left out where it is not known who failed.
        device: where it runs.
        begin: called before each try, with the contenders that are left out.

    Returns:
        The rows, and what of ours failed.

    Raises:
        DeviceFault: the device does not work any more. Its text is the contender, if it is known.
    """
    out, failures = sorted(without), list[str]()
    while True:
        begin(out)
        try:
            return job.run(out), failures
        except Exception as error:  # a benchmark that stops at the first bug shows only that one
            who = error.who if isinstance(error, ContenderError) else ""
            _say(f"FAILED: {job.title}: {type(error).__name__}: {error}")
            _say("".join(traceback.format_exception(error)))
            del error
        if not is_usable(device):
            raise DeviceFault(who)
        more = {who} if who else set(own)
        if who in own or not who:
            failures.append(f"{job.title}, {who or 'nobody knows who'}")
        if more <= set(out):  # it fails without them, too
            return [], failures
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
