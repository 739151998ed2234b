"""The plugin of the pytest processes that tests.others starts: our functions in the place of
torch's, only the chosen tests, and a line of JSON for whatever happens.

No part of the package ``tests``, whose name other people's checkouts want for theirs.
"""

from __future__ import annotations

import inspect
import json
import os
import random
from collections.abc import Iterator

import pytest
import torch

TASK = json.loads(os.environ["WNKERNEL_OTHERS"])
"""``ours``: whether torch's functions are replaced; ``tests``: what ``select`` found; ``report``: a
file."""

_built = 0
_reports = True  # not in a worker of pytest-xdist: the process that started it does

if TASK["ours"]:  # before anything is collected
    import wnkernel

    _init = wnkernel.WeightNorm.__init__

    def _count(self: torch.nn.Module, *args: object, **kwargs: object) -> None:
        global _built
        _built += 1
        _init(self, *args, **kwargs)

    wnkernel.WeightNorm.__init__ = _count
    patch = wnkernel.patch_torch()
    patch.__enter__()  # for as long as the process lives


def _say(**line: object) -> None:
    with open(TASK["report"], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    global _reports
    _reports = not hasattr(config, "workerinput")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen, others = [], []
    for item in items:
        # The function as it stands in the file, where decorators made several of one.
        function = inspect.unwrap(getattr(item, "function", None) or item.__class__)
        name = getattr(function, "__name__", item.name)
        names = TASK["tests"].get(str(item.path), ())
        (chosen if "*" in names or name in names else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = chosen


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    random.seed(0)  # the same numbers in both runs
    torch.manual_seed(0)
    before = _built
    _say(test=item.nodeid, outcome="crashed", error="the process ended in this test")
    result = yield
    _say(test=item.nodeid, built=_built - before)
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if _reports and (report.when == "call" or not report.passed):
        _say(test=report.nodeid, outcome=report.outcome, error=_error(report))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if _reports and report.failed:
        _say(test=report.nodeid, outcome="failed", error=_error(report))


def _error(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Its first line."""
    if not report.failed:
        return ""
    if crash := getattr(report.longrepr, "reprcrash", None):
        return crash.message.strip().partition("\n")[0]
    lines = str(report.longrepr).strip().splitlines()
    return next((line[1:].strip() for line in lines if line.startswith("E ")), lines[-1])
