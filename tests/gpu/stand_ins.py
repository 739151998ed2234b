"""What stands in for a GPU that faults, crashes or hangs in the tests of ``make gpu-check``.

Used as the process of a benchmark (:func:`faults` and the others), and as a plugin of pytest beside
``tests.gpu.visit``, where the device fails after every test whose name has "faulty" in it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator
from multiprocessing.connection import Connection

import pytest
import torch

from benchmarks.contenders import COPY, OURS, TORCH
from benchmarks.gpu import cases, raw
from benchmarks.gpu.cases import Request
from benchmarks.gpu.plan import GpuJob, Report
from benchmarks.results import Result, Subject, rows
from benchmarks.timing import blamed
from wnkernel.backends import BACKENDS
from wnkernel.cli.timing import Times

from ..processes import PATIENCE_S
from . import visit as gpu_visit

TITLES = ("first", "bad", "last")
CONTENDERS = (OURS, TORCH, COPY)


def _work(
    connection: Connection,
    request: Request,
    misfortune: Callable[[], None],
    patience_s: float = PATIENCE_S,
) -> None:
    """The process of a benchmark with three cases; ours meets with a misfortune in the backward of
    the second."""

    def jobs_of(request: Request, where: cases.Environment, fail: Report) -> list[GpuJob]:
        def run(title: str, without: Collection[str]) -> Iterator[list[Result]]:
            measured = [who for who in CONTENDERS if who not in without]
            for phase in ("forward", "backward"):
                if (title, phase) == ("bad", "backward") and OURS in measured:
                    with blamed(OURS):
                        misfortune()
                stats = dict.fromkeys(measured, Times(1.0, 1.0, 1.0, 3, 0.0))
                about = Subject("single", title, phase, "float32", "1", "0", "first", 1, 4)
                yield rows(about, where, stats)

        def job(title: str) -> GpuJob:
            own = patience_s if title == "bad" and not request.without else PATIENCE_S
            return GpuJob(title, lambda without: run(title, without), own)

        return [job(title) for title in TITLES]

    cases.jobs_of = jobs_of
    cases.work(connection, request)


def faults(connection: Connection, request: Request) -> None:
    """The device reports errors for everything from there on."""

    def fault() -> None:
        cases.is_usable = lambda device: False
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    _work(connection, request, fault)


def crashes(connection: Connection, request: Request) -> None:
    """The process is gone."""
    _work(connection, request, lambda: os._exit(11))


def hangs(connection: Connection, request: Request) -> None:
    """It never says anything again."""
    _work(connection, request, lambda: time.sleep(1e6), 10.0)


def is_wrong(connection: Connection, request: Request) -> None:
    """Nothing is wrong with the device."""

    def fail() -> None:
        raise AssertionError("ours is wrong")

    _work(connection, request, fail)


def does_not_begin(connection: Connection, request: Request) -> None:
    """As where a library is missing."""
    raise ImportError("no such library")


@pytest.fixture
def eager_is_ours(monkeypatch):
    """The eager backend in the part of one with kernels of ours."""
    monkeypatch.setattr(raw, "FALLBACK", "")
    return BACKENDS["eager"]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if "faulty" in item.name:

        def broken() -> None:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

        gpu_visit.synchronize = broken
