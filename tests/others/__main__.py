"""Both runs, and the table of what came of them."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from .selection import tests_of

HERE = Path(__file__).resolve().parent

BOTH, NEITHER, OURS, THEIRS, SKIPPED = KINDS = (
    "passed by both",
    "failed by both",
    "failed only with ours",
    "failed only with torch's",
    "skipped",
)


class Result(NamedTuple):
    """What came of a test."""

    outcome: str
    error: str = ""
    built: int = 0
    """How many weight norms of ours it built."""


def run(tests: dict[str, list[str]], arguments: list[str], *, ours: bool) -> dict[str, Result]:
    """One run, in a process of its own and an empty folder: a checkout may hold sources of torch
    that are not to be imported."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.jsonl")
        task = {"ours": ours, "tests": tests, "report": str(report)}
        paths = [str(HERE), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "WNKERNEL_OTHERS": json.dumps(task),
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "others_plugin"]
        command += ["-p", "no:cacheprovider", *arguments, "--", *tests]
        # What pytest says goes where it does not mix with the table.
        code = subprocess.call(command, cwd=folder, env=environment, stdout=sys.stderr)
        if not report.exists():
            print(f"pytest ran no test, its exit code is {code}", file=sys.stderr)
            sys.exit(2)
        lines = [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]
    results: dict[str, Result] = {}
    for line in lines:
        before = results.get(line["test"], Result("crashed"))
        if "built" in line:
            results[line["test"]] = before._replace(built=line["built"])
        elif before.outcome != "failed":  # subtests and teardowns come after
            results[line["test"]] = before._replace(outcome=line["outcome"], error=line["error"])
    return results


def kind(theirs: Result, ours: Result) -> str:
    """Which line of the table a test belongs to."""
    failed = [result.outcome in ("failed", "crashed") for result in (theirs, ours)]
    if any(failed):
        return NEITHER if all(failed) else OURS if failed[1] else THEIRS
    return SKIPPED if "skipped" in (theirs.outcome, ours.outcome) else BOTH


def main(argv: list[str] | None = None) -> int:
    """0: nothing fails only with ours; 1: something does; 2: nothing could be said."""
    parser = argparse.ArgumentParser(prog="python -m tests.others", description=__doc__)
    parser.add_argument("path", type=Path, help="a checkout, a folder of tests or one file")
    parser.add_argument("arguments", nargs="*", help="for pytest, after --: -n 4, -k 'not slow'")
    parser.add_argument("--library", default="transformers", help="whose classes have weight norms")
    parser.add_argument("--json", action="store_true", help="every test, as JSON")
    options = parser.parse_args(argv)
    path = options.path.resolve()
    if not path.exists():
        parser.error(f"path: expected a folder or a file, got {options.path}")
    tests = tests_of(path, options.library)
    if not tests:
        parser.error(f"path: expected tests that concern weight norm, got none in {options.path}")
    theirs, ours = (run(tests, options.arguments, ours=ours) for ours in (False, True))
    missing = Result("crashed", "not run")
    table = {
        test: (theirs.get(test, missing), ours.get(test, missing))
        for test in sorted({*theirs, *ours})
    }
    kinds = {test: kind(*results) for test, results in table.items()}
    if options.json:
        rows = [
            {"test": test, "kind": kinds[test], "torch": t._asdict(), "ours": o._asdict()}
            for test, (t, o) in table.items()
        ]
        print(json.dumps(rows, indent=1))
    else:
        for name in KINDS:
            of_kind = [test for test in table if kinds[test] == name]
            built = sum(table[test][1].built > 0 for test in of_kind)
            print(f"{name:25}{len(of_kind):6}, of which {built} build our layers")
        for name in (NEITHER, THEIRS, OURS):
            for test in (test for test in table if kinds[test] == name):
                print(f"\n{name}: {test}\n  {table[test][name != THEIRS].error}")
    return int(OURS in kinds.values())


if __name__ == "__main__":
    sys.exit(main())
