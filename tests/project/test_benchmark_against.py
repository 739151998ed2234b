"""The benchmark held against an earlier run, with made-up figures: what is worse, what is noise."""

from __future__ import annotations

import dataclasses
import math

import pytest

pytest.importorskip("typer", reason="the command line of the benchmark needs typer")
pytest.importorskip("rich", reason="the tables of the benchmark need rich")
pytest.importorskip("pandas", reason="the comparison needs pandas")

from typer.testing import CliRunner

from benchmarks import __main__ as benchmark
from benchmarks import against
from benchmarks.contenders import OURS, TORCH
from benchmarks.plan import Job
from benchmarks.results import Result, write_csv

from ..on_the_cpu import on_the_cpu
from .benchmark_rows import measured

__all__ = ["on_the_cpu"]

JOBS = 20


def job(i: int = 0, times_torch: float = 2.0, slower: float = 1.0, **about) -> list[Result]:
    """What a job gives on a machine that is so many times slower today."""
    about = {"case": "host", "spread": 0.01, "label": f"layer {i}", **about}
    return measured(ms={OURS: slower, TORCH: slower * times_torch}, **about)


def run(changed: dict[int, list[Result]] | None = None, **about) -> list[list[Result]]:
    return [(changed or {}).get(i) or job(i, **about) for i in range(JOBS)]


def rows_of(jobs: list[list[Result]]) -> list[Result]:
    return [r for rows in jobs for r in rows]


def labels(comparison: against.Comparison) -> list[str]:
    return [c.about[-1] for c in comparison.worse]


EARLIER = rows_of(run())
WORSE = {5: job(5, 1.7)}
"""A mutant: one of ours takes 18 % longer."""


def test_the_same_ratios_pass_on_a_slower_machine():
    comparison = against.compare(EARLIER, run(slower=3.0), {})
    assert comparison == against.Comparison([], 0, JOBS, 0, 0, 0)
    assert comparison.passed
    assert against.to_repeat(EARLIER, run(slower=3.0)) == []


def test_a_ratio_that_got_worse_is_named():
    comparison = against.compare(EARLIER, run(WORSE), {})
    assert labels(comparison) == ["layer 5"]
    assert not comparison.passed
    (change,) = comparison.worse
    assert (change.then, change.now) == (2.0, 1.7)
    back = against.compare(rows_of(run(WORSE)), run(), {})
    assert (back.worse, back.better) == ([], 1)


@pytest.mark.parametrize("about", [{"spread": 0.5, "rounds": 30}, {"spread": 0.08, "rounds": 3}])
def test_a_loss_within_the_spread_of_the_samples_is_noise(about):
    """Of either run."""
    noisy = run({5: job(5, 1.7, **about)})
    assert against.compare(EARLIER, noisy, {}).passed
    assert against.compare(rows_of(run(**about)), run(WORSE), {}).passed
    many = {**about, "rounds": 3000}
    assert not against.compare(EARLIER, run({5: job(5, 1.7, **many)}), {}).passed


def test_what_looks_worse_is_run_again_with_a_sample_of_its_case():
    others = [job(i, case="fused") for i in range(3)]
    now = [*others, *run(WORSE)]
    assert against.to_repeat([*rows_of(others), *EARLIER], now) == [3, 3 + 5, 3 + 8, 3 + 16]


def test_a_burst_of_other_work_does_not_come_back():
    again = {i: job(i) for i in (0, 5, 8, 16)}
    assert against.compare(EARLIER, run(WORSE), again).passed
    assert labels(against.compare(EARLIER, run(WORSE), {**again, **WORSE})) == ["layer 5"]


def test_the_floor_is_what_unchanged_ratios_move():
    steady = {i: job(i, 2.0) for i in (0, 8, 16)}
    restless = {i: job(i, times) for i, times in ((0, 2.0), (8, 1.8), (16, 2.2))}
    for again, passed in ((steady, False), (restless, True)):
        assert against.compare(EARLIER, run(WORSE), {**again, **WORSE}).passed == passed
    other_case = [job(i, case="fused") for i in range(3)]
    other_worse = {i: job(i, 1.7, case="fused") for i in range(3)}
    comparison = against.compare(
        [*rows_of(other_case), *EARLIER],
        [*other_worse.values(), *run()],
        {3 + i: rows for i, rows in restless.items()},
    )
    assert len(comparison.worse) == 3


def test_the_floor_is_not_learnt_of_what_looked_worse():
    """Those jobs were chosen because they had moved, and move back."""
    burst = {i: job(i, 1.7) for i in range(1, 8)}
    again = {i: job(i) for i in (*range(9), 16)}
    assert labels(against.compare(EARLIER, run(burst), {**again, **WORSE})) == ["layer 5"]


@pytest.mark.parametrize(
    "again", [{}, {i: job(i) for i in (0, 8, 16)}], ids=["no sample", "sample"]
)
def test_the_least_floor_is_not_learnt(again):
    """What differs between two processes, a sample of one does not show."""
    for times_torch, passed in ((1.93, True), (1.9, False)):
        moved = {5: job(5, times_torch)}
        assert against.compare(EARLIER, run(moved), {**again, **moved}).passed == passed


def test_ratios_to_a_torch_that_paid_for_memory_are_set_aside():
    paid = {5: job(5, 1.7, faults={TORCH: 500.0})}  # a quarter of a millisecond of 1.7
    comparison = against.compare(EARLIER, run(paid), {})
    assert (comparison.passed, comparison.set_aside, comparison.compared) == (True, 1, JOBS - 1)
    assert against.to_repeat(EARLIER, run(paid)) == []
    both = against.compare(rows_of(run({5: job(5, faults={TORCH: 500.0})})), run(paid), {})
    assert labels(both) == ["layer 5"]
    for faults in ({TORCH: 100.0}, {TORCH: math.nan}, {OURS: 500.0}):
        comparison = against.compare(EARLIER, run({5: job(5, 1.7, faults=faults)}), {})
        assert labels(comparison) == ["layer 5"]


def test_a_loss_of_all_shows_in_the_group():
    loose = {"spread": 0.08}
    earlier = rows_of(run(**loose))
    comparison = against.compare(earlier, run(times_torch=1.87, **loose), {})
    (change,) = comparison.worse
    assert change.about[4] == f"{JOBS} together"
    assert change.now / change.then == pytest.approx(1.87 / 2)
    few = rows_of(run(**loose))[: 2 * 7]  # two contenders each
    assert against.compare(few, run(times_torch=1.87, **loose), {}).passed


def test_what_only_one_side_has_is_counted():
    """Peaks of memory are not there to be compared."""
    peaks = [dataclasses.replace(r, label="peak", rounds=0, median_ms=math.nan) for r in job()]
    comparison = against.compare(EARLIER, [*run()[4:], job(99), peaks], {})
    assert (comparison.compared, comparison.only_then, comparison.only_now) == (JOBS - 4, 4, 1)


def invoke(monkeypatch, tmp_path, earlier, *jobs, first=()):
    """The exit code and the output of a run of these jobs, and how often each was run."""
    times = dict.fromkeys(range(JOBS), 0)

    def counted(i):
        times[i] += 1
        return dict(first).get(i, jobs[i]) if times[i] == 1 else jobs[i]

    made = [Job(str(i), lambda i=i: counted(i)) for i in range(len(jobs))]
    monkeypatch.setattr(benchmark, "_jobs", lambda *args: made)
    options = ("--only", "host", "--out", str(tmp_path / "out"), "--against", str(earlier))
    told = CliRunner().invoke(benchmark.app, options)
    return told.exit_code, " ".join(told.output.split()), times


@pytest.fixture
def file(tmp_path):
    (path,) = write_csv(EARLIER, tmp_path / "earlier")
    return path


def test_the_command_line_passes_what_did_not_get_worse(monkeypatch, tmp_path, file):
    for path in (file, file.parent):
        code, told, times = invoke(monkeypatch, tmp_path, path, *run(), first=WORSE)
        assert code == 0, told
        assert "Compared 20 ratios to torch: 0 worse" in told
        assert "Not the same" not in told
        assert [i for i, n in times.items() if n == 2] == [0, 5, 8, 16]


def test_the_command_line_fails_what_got_worse(monkeypatch, tmp_path, file):
    code, told, _ = invoke(monkeypatch, tmp_path, file, *run(WORSE))
    assert code == 1
    assert "Worse than before: 1" in told
    assert "layer 5 │ 2.00 │ 1.70 │ -15.0 % │" in told


def test_a_file_of_another_machine_is_compared_and_said_to_be(monkeypatch, tmp_path):
    other = [dataclasses.replace(r, device="Some CPU", torch="2.4") for r in EARLIER]
    (path,) = write_csv(other, tmp_path / "other")
    code, told, _ = invoke(monkeypatch, tmp_path, path, *run())
    assert code == 0
    note = told.partition("Against ")[2].partition("Compared")[0]
    assert "Not the same: device Some CPU; torch 2.4. Ratios only compare where all" in note


def test_with_nothing_to_compare_nothing_is_passed(monkeypatch, tmp_path, file):
    code, told, _ = invoke(monkeypatch, tmp_path, file, job(99))
    assert code == 1
    assert "Compared 0 ratios" in told
    assert "Only there: 20, only here: 1" in told


@pytest.mark.parametrize("bad", ["missing", "text", "binary", "folder", "case", "times"])
def test_bad_files_are_refused_before_anything_is_run(monkeypatch, tmp_path, file, bad):
    path = tmp_path / "bad"
    if bad == "text":
        path.write_text("a,b\n1,2\n")
    elif bad == "binary":
        path.write_bytes(b"\x80\x00" * 99)
    elif bad == "folder":
        path.mkdir()
    elif bad == "case":
        (path,) = write_csv([dataclasses.replace(r, case="gan") for r in EARLIER], path)
    elif bad == "times":
        (path,) = write_csv([r for r in EARLIER if r.contender != TORCH], path)
    code, told, times = invoke(monkeypatch, tmp_path, path, *run())
    assert code == 2
    assert "Invalid value" in told
    assert not any(times.values())
