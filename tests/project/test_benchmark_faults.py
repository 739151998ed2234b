"""Page faults in the results of the benchmark: counted for each contender, kept, shown."""

from __future__ import annotations

import io
import itertools
import math
import mmap

import pytest
import torch

pytest.importorskip("rich", reason="the tables of the benchmark need rich")

from rich.console import Console

from benchmarks import report, results, timing
from benchmarks.contenders import COPY, FUSED, OURS, TORCH
from benchmarks.environment import environment
from benchmarks.processes import measure_apart

from ..on_the_cpu import on_the_cpu
from .benchmark_rows import measured

__all__ = ["on_the_cpu"]

PAGES = 64
WALL = timing.device_sampler(torch.device("cpu"))


def fresh() -> None:
    """Touches every page of memory that nobody touched before."""
    with mmap.mmap(-1, PAGES * mmap.PAGESIZE) as memory:
        for page in range(PAGES):
            memory[page * mmap.PAGESIZE] = 1


def of_fresh():
    return fresh


def of_nothing():
    return int


def test_faults_are_those_of_one_call_of_their_contender():
    so_far = {"ten": itertools.count(0, 10), "none": itertools.repeat(7)}
    runs = dict.fromkeys(so_far, int)
    stats = timing.measure(
        runs, lambda run, times: 1.0, 0.0, faults_of=lambda who: next(so_far[who])
    )
    assert {name: s.faults for name, s in stats.items()} == {"ten": 10.0, "none": 0.0}


def test_faults_of_a_sample_are_shared_by_its_calls():
    seconds = itertools.chain([9.9, 0.25], itertools.repeat(1.0))  # five calls fill a second
    so_far = itertools.count(0, 30)
    stats = timing.measure(
        {"who": int},
        lambda run, times: next(seconds),
        0.0,
        faults_of=lambda who: next(so_far),
        min_sample_s=1.0,
    )
    assert stats["who"].faults == 30 / 5


def test_fresh_memory_is_seen_here_and_in_other_processes():
    pytest.importorskip("resource")
    here = timing.measure({"fresh": fresh, "nothing": int}, WALL, 0.0)
    prepare = {"fresh": of_fresh, "nothing": of_nothing}
    apart = measure_apart(prepare, environment("cpu", None), 0.0)
    for stats in (here, apart):
        assert stats["fresh"].faults >= 1  # fewer than pages where the system gives large ones
        assert stats["nothing"].faults < 1


def test_a_system_that_does_not_tell(monkeypatch):
    monkeypatch.setattr(timing, "resource", None)
    assert math.isnan(timing.measure({"who": int}, WALL, 0.0)["who"].faults)


def test_faults_are_kept_in_files(tmp_path):
    (path,) = results.write_csv(measured(faults={OURS: 0.25, TORCH: 512.0}), tmp_path)
    assert [r.faults for r in results.read_csv(path)] == [0.25, 512.0, 0.0]


def test_files_without_faults_are_read(tmp_path):
    """As older commits wrote them."""
    (path,) = results.write_csv(measured(faults={OURS: 0.25, TORCH: 512.0}), tmp_path)
    lines = [line.rpartition(",") for line in path.read_text().splitlines()]
    assert [last for _, _, last in lines] == ["faults", "0.25", "512", "0"]
    path.write_text("".join(f"{line}\n" for line, _, _ in lines))
    assert [math.isnan(r.faults) for r in results.read_csv(path)] == [True] * 3


def shown(rows: list[results.Result]) -> str:
    out = io.StringIO()
    report.print_results(Console(file=out, width=200), rows)
    return out.getvalue()


def test_tables_have_faults_of_torch_and_ours():
    faults = {TORCH: 512.0, OURS: 3.0, FUSED: 4.0}
    assert "512 / 3" in shown(measured(faults=faults))
    assert "/ 3" not in shown(measured(faults={**faults, TORCH: math.nan}))
    times = dict.fromkeys((TORCH, OURS, FUSED, COPY), 1.0)
    assert "512 / 4" in shown(measured("fused", times, faults=faults))
