"""``python -m tests.mutation [--every N] [PATTERN]``: a table of modules, and what nothing noticed.

Each fault is tried in a process of its own, forked from one that has imported torch, until the
first test that fails. ``--every N`` tries those of every N-th place.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, ModuleType

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 300

SLOTS = ("grouping/test_slots",)
KEYS = (
    "checkpoint/test_errors",
    "checkpoint/test_layouts",
    "checkpoint/test_torch_models",
    "checkpoint/test_checkpoints",
    "checkpoint/test_spellings",
    "checkpoint/test_load_hooks",
    "checkpoint/test_torch_others",
    "checkpoint/test_convert",
    "checkpoint/test_convert_like",
    "models/test_convert",
    "checkpoint/test_properties",
    "checkpoint/test_models",
    "models/test_assigning",
    "models/test_layer",
    "core/test_norms_of_v",
    "checkpoint/test_sharded",
    "models/test_restored_weights",
)
CENSUS = (
    "models/test_census",
    "models/test_convert",
    "models/test_convert_refused",
    "models/test_fold",
    "checkpoint/test_convert_like",
    "models/test_fusing_norms",
    "models/test_patch_torch",
    "models/test_remove",
    "models/test_init_weight",
)
TESTS = {
    "grouping/slots.py": SLOTS,
    "census.py": CENSUS,
    **{
        f"checkpoint/{name}.py": KEYS
        for name in ("agreement", "pairs", "legacy", "normed", "convert", "loading", "accept")
    },
}
"""Modules, and the files of tests that are to find what is wrong with them, quick ones first."""


class Loader(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives one module other code."""

    def __init__(self, name: str, code: CodeType) -> None:
        self._name, self._code = name, code

    def find_spec(self, name: str, *_: object) -> importlib.machinery.ModuleSpec | None:
        if name != self._name:
            return None
        return importlib.machinery.ModuleSpec(name, self, origin=self._code.co_filename)

    def exec_module(self, module: ModuleType) -> None:
        exec(self._code, module.__dict__)


def start(file: str, code: CodeType | None) -> int:
    """The number of a process that runs the tests of a module; status 0: they pass."""
    import pytest

    if child := os.fork():
        return child
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)
    if code is not None:
        name = "wnkernel." + file.removesuffix(".py").replace("/", ".")
        sys.meta_path.insert(0, Loader(name, code))
    tests = [str(ROOT / "tests" / f"{test}.py") for test in TESTS[file]]
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "not triton"]
    status = 1
    try:
        status = pytest.main([*options, *tests])
    finally:
        os._exit(int(status))


def finished(running: dict[int, tuple[float, object]]) -> Iterator[tuple[int, int]]:
    """Processes that have ended or taken too long, and their status."""
    for child, (began, _) in list(running.items()):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            yield child, status
        elif time.monotonic() - began > PATIENCE_S:
            os.killpg(child, signal.SIGKILL)
            yield child, os.waitpid(child, 0)[1]


def main() -> int:
    from .faults import faults

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pattern", nargs="?", default="", help="of names of modules")
    parser.add_argument("--every", type=int, default=1, help="of how many places one is tried")
    parser.add_argument("--jobs", type=int, default=2)
    chosen = parser.parse_args()
    survivors = 0
    print(f"{'module':26} {'faults':>6} {'found':>6}", flush=True)
    for file in (name for name in TESTS if chosen.pattern in name):
        path = ROOT / "wnkernel" / file
        control = start(file, None)
        if os.waitpid(control, 0)[1]:
            raise SystemExit(f"{file}: its tests fail without a fault")
        waiting = list(faults(path.read_text(), chosen.every))
        total, lost, running = len(waiting), [], {}
        while waiting or running:
            while waiting and len(running) < chosen.jobs:
                fault = waiting.pop()
                code = compile(fault.tree, str(path), "exec")
                running[start(file, code)] = time.monotonic(), fault
            for child, status in finished(running):
                _, fault = running.pop(child)
                if status == 0:
                    lost.append(f"  {file}:{fault.line}: {fault.was!r} -> {fault.now!r}")
            time.sleep(0.05)
        print(f"{file:26} {total:6} {total - len(lost):6}", *sorted(lost), sep="\n", flush=True)
        survivors += len(lost)
    return min(survivors, 1)


if __name__ == "__main__":
    import hypothesis  # noqa: F401
    import numpy  # noqa: F401
    import torch._dynamo  # noqa: F401

    sys.exit(main())
