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
"""``ours``: whether torch's functions are replaced; ``tests``: file -> names of functions, or
``["*"]``; ``report``: a file."""

_built = 0


def _replace() -> None:
    import wnkernel

    build = wnkernel.WeightNorm.__init__

    def counted(self: torch.nn.Module, *args: object, **kwargs: object) -> None:
        global _built
        _built += 1
        build(self, *args, **kwargs)

    wnkernel.WeightNorm.__init__ = counted
    # Held by this module: the end of the block, and so of the patch, is the end of the process.
    global _patch
    _patch = wnkernel.patch_torch()
    _patch.__enter__()


if TASK["ours"]:
    _replace()  # before anything is collected


def _say(**line: object) -> None:
    with open(TASK["report"], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen, others = [], []
    for item in items:
        # Of a test that a decorator made several of, the function as it stands in the file.
        name = inspect.unwrap(getattr(item, "function", None) or _nothing).__name__
        names = TASK["tests"].get(str(item.path), ())
        (chosen if "*" in names or name in names else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = chosen


def _nothing() -> None: ...


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[object]:
    """The same random numbers in both runs."""
    random.seed(0)
    torch.manual_seed(0)
    before = _built
    _say(test=item.nodeid, outcome="crashed", error="the process ended in this test")
    result = yield
    _say(test=item.nodeid, built=_built - before)
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if os.environ.get("PYTEST_XDIST_WORKER") or (report.passed and report.when != "call"):
        return
    _say(test=report.nodeid, outcome=report.outcome, error=_error(report))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed and not os.environ.get("PYTEST_XDIST_WORKER"):
        _say(test=report.nodeid, outcome="failed", error=_error(report))


def _error(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Its first line."""
    if not report.failed:
        return ""
    if crash := getattr(report.longrepr, "reprcrash", None):
        return crash.message.strip().partition("\n")[0]
    lines = str(report.longrepr).strip().splitlines()
    return next((line[1:].strip() for line in lines if line.startswith("E ")), lines[-1])
