"""The CI file for public hosts runs targets of the Makefile, and versions of tests/matrix.py."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ..matrix import LEGS
from ..processes import ROOT

yaml = pytest.importorskip("yaml", reason="reading a CI file needs PyYAML")

WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
SCRIPT = ROOT / ".ci" / "run"
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.fixture(scope="module")
def jobs() -> dict[str, Any]:
    return yaml.safe_load(WORKFLOW.read_text())["jobs"]


def lines(job: dict[str, Any]) -> list[str]:
    """What a job runs, once for each value of its matrix."""
    runs = [step["run"] for step in job["steps"] if "run" in step]
    matrix = job.get("strategy", {}).get("matrix", {})
    rows = matrix.get("include") or [{"target": target} for target in matrix.get("target", [""])]
    return [
        re.sub(r"\$\{\{ matrix\.(\w+) \}\}", lambda found, row=row: row[found[1]], run)
        for row in rows
        for run in runs
    ]


def test_every_line_is_a_target_of_the_makefile(jobs: dict[str, Any]) -> None:
    found = [line for job in jobs.values() for line in lines(job)]
    assert found
    for line in found:
        target = re.fullmatch(r"make ([a-z-]+)( ARGS=(\S+|\"[^\"]*\"))?", line)
        assert target, line
        assert target[1] in TARGETS, line


def test_it_runs_what_the_other_ci_runs(jobs: dict[str, Any]) -> None:
    script_lines = [line for line in SCRIPT.read_text().splitlines() if line.startswith("make ")]
    assert script_lines
    assert set(script_lines) <= set(lines(jobs["test"]))


def test_versions_are_legs_of_the_matrix(jobs: dict[str, Any]) -> None:
    """The oldest and the newest torch, and every Python."""
    rows = jobs["versions"]["strategy"]["matrix"]["include"]
    by_name = {leg.name: leg for leg in LEGS}
    legs = [by_name[row["leg"]] for row in rows]
    assert [row["python"] for row in rows] == [leg.python for leg in legs]
    assert {LEGS[0].torch, LEGS[-1].torch} <= {leg.torch for leg in legs}
    tested = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert {leg.python for leg in LEGS} == set(tested)
    assert {leg.python for leg in legs} >= set(tested)
    commands = [line.split()[-3] for line in lines(jobs["versions"])]
    assert commands == [leg.name for leg in legs]


def test_nothing_is_trusted_with_more_than_reading() -> None:
    workflow = yaml.safe_load(WORKFLOW.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    assert not any("permissions" in job for job in workflow["jobs"].values())
