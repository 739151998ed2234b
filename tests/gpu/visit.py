"""A plugin of pytest for visits to a GPU: ``-p tests.gpu.visit``.

After every test the device is waited for, so that a fault is that of the test which caused it, and
not of the one that happens to meet it. CUDA refuses everything afterwards, so the process is
replaced. A line of a CSV file says what became of each test as soon as that is known.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

HEADER = ("about", "test", "outcome", "seconds", "message")
FIXTURES = ("backend", "route", "gpu_backend", "compiled_backend")
"""What a test is run on."""

BROKEN_STATUS = 70
"""Of a process whose device reports errors for everything."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("visits to a GPU")
    group.addoption("--results", type=Path, help="CSV file that a line is added to for every test")
    group.addoption("--about", default="", help="the device and the commit, for that file")
    group.addoption("--only-backends", default="", help="tests that run on one of these")
    group.addoption(
        "--and-without-backend",
        action="store_true",
        help="and those that are not run on one backend after the other",
    )


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Results(config), "results-of-a-visit")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if wanted := set(filter(None, config.getoption("--only-backends").split(","))):
        config.hook.pytest_deselected(items=[i for i in items if not _is_for(i, wanted)])
        items[:] = [i for i in items if _is_for(i, wanted)]


def _is_for(item: pytest.Item, backends: set[str]) -> bool:
    given = getattr(item, "callspec", None)
    chosen = {given.params[name] for name in FIXTURES if given and name in given.params}
    if not chosen:
        return item.config.getoption("--and-without-backend")
    return bool(chosen & backends)


def synchronize() -> None:
    """Waits for the device of the tests.

    Raises:
        RuntimeError: something went wrong there.
    """
    if torch.empty(0).device.type == "cuda":
        torch.cuda.synchronize()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    try:
        return (yield)
    finally:
        try:
            synchronize()
        except RuntimeError as error:
            item.config.stash[_BROKEN] = True
            pytest.fail(f"the device fails after this test: {error}", pytrace=False)


_BROKEN = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    result = yield
    if item.config.stash.get(_BROKEN, False):
        if hasattr(item.config, "workerinput"):
            os._exit(BROKEN_STATUS)  # pytest-xdist starts another one
        pytest.exit(f"{item.nodeid}: the device reports errors for everything", BROKEN_STATUS)
    return result


class Results:
    """Writes the file, in the process that all reports come to."""

    def __init__(self, config: pytest.Config) -> None:
        self._path: Path | None = config.getoption("--results")
        self._about: str = config.getoption("--about")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:  # or an error before or after it
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message if crash else str(report.longrepr or "")
            if report.skipped and isinstance(report.longrepr, tuple):
                message = report.longrepr[-1]
            self._write(report.nodeid, report.outcome, report.duration, message)

    def _write(self, test: str, outcome: str, seconds: float, message: str) -> None:
        if self._path is None:
            return
        try:
            with self._path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                if file.tell() == 0:
                    writer.writerow(HEADER)
                writer.writerow((self._about, test, outcome, f"{seconds:.3f}", message[:500]))
        except OSError as error:
            print(f"{self._path} cannot be written: {error.strerror}")
            self._path = None
