"""A fault stays where it happened: processes of the GPU benchmark, and of its tests, that die."""

from __future__ import annotations

import csv
import time

import pytest

pytest.importorskip("typer", reason="the command line of the benchmark needs typer")
pytest.importorskip("rich", reason="the tables of the benchmark need rich")

from benchmarks.contenders import COPY, OURS, TORCH
from benchmarks.gpu import cases
from benchmarks.gpu.cases import RESULTS, Request, Section
from benchmarks.gpu.plan import Part
from benchmarks.gpu.summary import read

from ..processes import PATIENCE_S, python
from . import stand_ins as gpu_stand_ins
from .visit import BROKEN_STATUS, HEADER


def request(folder, **more) -> Request:
    deadline = time.monotonic() + PATIENCE_S
    return Request("cpu", "", Part.KEY, tuple(Section), True, folder, deadline, **more)


@pytest.mark.parametrize(
    ("work", "told"),
    [
        (gpu_stand_ins.faults, "its device reports errors for everything"),
        (gpu_stand_ins.crashes, "died with exit status 11"),
        (gpu_stand_ins.hangs, "said nothing for 10 s"),
    ],
)
def test_a_process_that_dies_is_started_again(monkeypatch, tmp_path, work, told):
    """With the case that it died in, without ours, and then with everything that comes after."""
    for name in ("START_S", "END_S"):
        monkeypatch.setattr(cases, name, PATIENCE_S)
    said: list[str] = []
    tally = cases.measure(request(tmp_path), said.append, work)
    measured = {
        title: {r.contender for r in read(tmp_path) if r.label == title}
        for title in gpu_stand_ins.TITLES
    }
    everyone = {OURS, TORCH, COPY}
    assert measured == {"first": everyone, "bad": everyone, "last": everyone}
    bad = [(r.phase, r.contender) for r in read(tmp_path) if r.label == "bad"]
    assert bad == [
        *(("forward", who) for who in (OURS, TORCH, COPY)),  # it was measured before, and is kept
        *(("backward", who) for who in (TORCH, COPY)),
    ]
    assert len(read(tmp_path)) == tally.rows == 17
    assert len(tally.failures) == 1
    assert tally.failures[0].startswith("bad, ")
    assert told in "\n".join(said)


def test_a_contender_that_fails_is_left_out_by_the_same_process(tmp_path, capfd):
    said: list[str] = []
    tally = cases.measure(request(tmp_path), said.append, gpu_stand_ins.is_wrong)
    assert said == []
    assert tally.failures == [f"bad, {OURS}"]
    bad = [(r.phase, r.contender) for r in read(tmp_path) if r.label == "bad"]
    assert bad[3:] == [("backward", TORCH), ("backward", COPY)]
    told = capfd.readouterr().out
    assert "bad: ContenderError: wnkernel: AssertionError: ours is wrong" in told
    assert f"FAILED: bad, {OURS}" in told


def test_a_process_that_does_not_begin_is_told_and_not_tried_again(monkeypatch, tmp_path):
    monkeypatch.setattr(cases, "END_S", PATIENCE_S)
    said: list[str] = []
    tally = cases.measure(request(tmp_path), said.append, gpu_stand_ins.does_not_begin)
    assert tally.failures == ["before the first case, nobody knows who"]
    assert "died with exit status 1" in said[0]


def test_no_case_is_begun_after_the_deadline(tmp_path):
    late = Request("cpu", "", Part.KEY, tuple(Section), True, tmp_path, time.monotonic() - 1)
    tally = cases.measure(late, print, gpu_stand_ins.is_wrong)
    assert (tally.rows, tally.left_out) == (0, "first")


def test_rows_that_cannot_be_written_are_said(tmp_path, capfd):
    (tmp_path / RESULTS).symlink_to("/dev/full")
    cases.measure(request(tmp_path), print, gpu_stand_ins.is_wrong)
    out = capfd.readouterr().out
    assert "cannot be written: No space left on device" in out
    assert sum(line.startswith("single,last,") for line in out.splitlines()) == 6


SUITE = """
import pytest

@pytest.mark.parametrize("route", ["cuda"])
def test_faulty(*, route): pass

@pytest.mark.parametrize("k", range(6))
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_fine(*, backend, k): pass

def test_wrong(): assert 1 == 2
"""


def visit(folder, *arguments):
    """Runs it, and gives its exit status and what the file says: test -> outcomes."""
    (folder / "test_suite.py").write_text(SUITE)
    results = folder / "tests.csv"
    done = python(
        "-m", "pytest", "-q", "--rootdir", str(folder), "-p", "no:cacheprovider",
        "-p", "tests.gpu.visit", "-p", "tests.gpu.stand_ins", "--results", str(results),
        "--about", "a card, commit abc", *arguments, str(folder / "test_suite.py"),
    )  # fmt: skip
    with results.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == HEADER
    assert {line["about"] for line in lines} == {"a card, commit abc"}
    outcomes: dict[str, list[str]] = {}
    for line in lines:
        outcomes.setdefault(line["test"].rpartition("::")[2], []).append(line["outcome"])
    return done, outcomes, lines


def test_a_fault_is_that_of_its_test_and_the_process_is_replaced(tmp_path):
    pytest.importorskip("xdist", reason="processes of tests are those of pytest-xdist")
    done, outcomes, lines = visit(tmp_path, "-n", "2")
    fine = [f"test_fine[{backend}-{k}]" for backend in ("cuda", "triton") for k in range(6)]
    assert all(outcomes.pop(name) == ["passed"] for name in fine)
    assert outcomes.pop("test_wrong") == ["failed"]
    (faulty,) = outcomes
    assert faulty == "test_faulty[cuda]"
    # by itself, by what came after it, and as the one that its process ended with
    assert outcomes[faulty] == ["passed", "failed", "failed"]
    told = [line["message"] for line in lines if "faulty" in line["test"]]
    assert "an illegal memory access was encountered" in told[1]
    assert "node down: Not properly terminated" in done.stdout  # and the others have passed


def test_without_processes_to_replace_a_fault_ends_the_tests(tmp_path):
    done, outcomes, _ = visit(tmp_path, "-p", "no:xdist")
    assert done.returncode == BROKEN_STATUS
    assert outcomes == {"test_faulty[cuda]": ["passed", "failed"]}


def test_only_tests_of_some_backends_can_be_chosen(tmp_path):
    chosen = ("-p", "no:xdist", "--only-backends", "triton,auto")
    _, outcomes, _ = visit(tmp_path, *chosen)
    of_triton = {f"test_fine[triton-{k}]" for k in range(6)}
    assert set(outcomes) == of_triton
    (tmp_path / "tests.csv").unlink()
    _, outcomes, _ = visit(tmp_path, *chosen, "--and-without-backend")
    assert set(outcomes) == of_triton | {"test_wrong"}
