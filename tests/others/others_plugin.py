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

TASK = json.loads(os.environ["WNKERNEL_OTHERS"])  # what __main__.run says

REPORTS = "PYTEST_XDIST_WORKER" not in os.environ  # the process that started a worker does
_built: list[None] = []

if TASK["ours"]:  # before anything is collected
    import wnkernel

    _init = wnkernel.WeightNorm.__init__

    def _count(self: torch.nn.Module, *args: object, **kwargs: object) -> None:
        _built.append(None)
        _init(self, *args, **kwargs)

    wnkernel.WeightNorm.__init__ = _count
    patch = wnkernel.patch_torch()
    patch.__enter__()  # for as long as the process lives


def _say(**line: object) -> None:
    with open(TASK["report"], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


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
    before = len(_built)
    _say(test=item.nodeid, outcome="crashed", error="the process ended in this test")
    result = yield
    _say(test=item.nodeid, built=len(_built) - before)
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if REPORTS and (report.when == "call" or not report.passed):
        text = getattr(getattr(report.longrepr, "reprcrash", None), "message", report.longreprtext)
        error = text.strip().partition("\n")[0] if report.failed else ""
        _say(test=report.nodeid, outcome=report.outcome, error=error)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if REPORTS and report.failed:
        lines = [line for line in report.longreprtext.splitlines() if line.startswith("E ")]
        _say(test=report.nodeid, outcome="failed", error=lines[0][1:].strip() if lines else "")
