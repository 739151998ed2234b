"""Runs the tests of a checkout that concern weight norm with torch's functions and with ours."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .selection import select

HERE = Path(__file__).resolve().parent
BOTH, NEITHER, SKIPPED = "passed by both", "failed by both", "skipped"
THEIRS, OURS = "failed only with torch's", "failed only with ours"
Result = dict[str, Any]
"""``outcome``, first line of the ``error``, and how many weight norms of ours were ``built``."""


def run(tests: dict[str, list[str]], arguments: list[str], *, ours: bool) -> dict[str, Result]:
    """Test -> what came of it, in a process of its own and in an empty folder, because a checkout
    of torch holds sources of torch that are not to be imported."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.jsonl")
        task = {"ours": ours, "tests": tests, "report": str(report)}
        paths = [str(HERE), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"WNKERNEL_OTHERS": json.dumps(task)}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        for ours_alone in ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER"):
            environment.pop(ours_alone, None)  # set where our own tests run
        command = [sys.executable, "-m", "pytest", "-q", "-p", "others_plugin"]
        # In one order both times: a test that ends the process takes those after it along.
        command += ["-p", "no:randomly", "-p", "no:cacheprovider"]
        command += ["--continue-on-collection-errors", *arguments, "--", *tests]
        # What pytest says goes where it does not mix with the table.
        code = subprocess.call(command, cwd=folder, env=environment, stdout=sys.stderr)
        if not report.exists():
            print(f"pytest ran no test, its exit code is {code}", file=sys.stderr)
            sys.exit(2)
        lines = [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]
    results: dict[str, Result] = {}
    for line in lines:
        result = results.setdefault(line.pop("test"), {"outcome": "", "error": "", "built": 0})
        if "outcome" not in line or result["outcome"] != "failed":  # as a subtest, or teardown
            result.update(line)
    return results


def compare(theirs: dict[str, Result], ours: dict[str, Result]) -> list[dict[str, Any]]:
    """A row for each test."""
    rows = []
    for test in sorted({*theirs, *ours}):
        not_run = {"outcome": "crashed", "error": "not run", "built": 0}
        torchs, own = (side.get(test, not_run) for side in (theirs, ours))
        bad = tuple(result["outcome"] in ("failed", "crashed") for result in (torchs, own))
        kind = {(True, True): NEITHER, (True, False): THEIRS, (False, True): OURS}.get(bad)
        if kind is None:
            kind = SKIPPED if "skipped" in (torchs["outcome"], own["outcome"]) else BOTH
        rows.append({"test": test, "kind": kind, "torch": torchs, "ours": own})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """How many of each kind, and what failed."""
    lines = []
    for kind in (BOTH, NEITHER, THEIRS, OURS, SKIPPED):
        built = [row["ours"]["built"] > 0 for row in rows if row["kind"] == kind]
        lines.append(f"{kind:24}{len(built):6}, of which {sum(built)} build our layers")
    for kind, side in ((NEITHER, "ours"), (THEIRS, "torch"), (OURS, "ours")):
        failed = [row for row in rows if row["kind"] == kind]
        lines += [f"\n{kind}: {row['test']}\n  {row[side]['error']}" for row in failed]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """0: nothing fails only with ours; 1: something does; 2: there is nothing to say."""
    parser = argparse.ArgumentParser(prog="python -m tests.others", description=__doc__)
    parser.add_argument("path", type=Path, help="a checkout, a folder of tests, or one file")
    parser.epilog = "What comes after -- is for pytest: -- -n 4 -k 'not slow'."
    parser.add_argument("--library", default="transformers", help="tests of its classes, too")
    parser.add_argument("--json", action="store_true", help="every test, as JSON")
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if "--" in argv else len(argv)
    options, arguments = parser.parse_args(argv[:end]), argv[end + 1 :]
    if not options.path.exists():
        parser.error(f"path: expected a folder or a file, got {options.path}")
    tests = select(options.path.resolve(), options.library)
    if not tests:
        parser.error(f"path: expected tests that concern weight norm, got {options.path}")
    rows = compare(*(run(tests, arguments, ours=ours) for ours in (False, True)))
    print(json.dumps(rows, indent=1) if options.json else table(rows))
    return int(any(row["kind"] == OURS for row in rows))


if __name__ == "__main__":
    sys.exit(main())
