"""What is printed at the end of a run of the benchmark, of made-up results."""

from __future__ import annotations

import dataclasses
import io

import pytest
import torch

pytest.importorskip("typer", reason="the command line of the benchmark needs typer")
pytest.importorskip("rich", reason="the tables of the benchmark need rich")
pytest.importorskip("pandas", reason="the summary needs pandas")

from rich.console import Console
from typer.testing import CliRunner

from benchmarks import __main__ as benchmark
from benchmarks import layers, summary
from benchmarks.contenders import COPY, ENGINE, FUSED, OURS, TORCH, UNCHANGED, VERSION
from benchmarks.environment import environment, results_folder
from benchmarks.plan import QUICK, Job
from benchmarks.results import ALONE, FORWARD, FORWARD_BACKWARD, READ, STEP

from ..on_the_cpu import on_the_cpu
from .benchmark_rows import measured

__all__ = ["on_the_cpu"]


def printed(rows) -> dict[str, list[str]]:
    """The table of aims: the cells of a group by its title."""
    out = io.StringIO()
    summary.print_summary(Console(file=out, width=250), rows)
    lines = (line.strip("│ \n").split("│") for line in out.getvalue().splitlines() if "│" in line)
    return {title.strip(): [cell.strip() for cell in cells] for title, *cells in lines}


def layer(phase: str, times_torch: float, kind: str = "first", **about):
    ms = {OURS: 1.0, TORCH: times_torch, COPY: 1.0}
    return measured(ms=ms, phase=phase, kind=kind, **{"label": kind, **about})


def test_groups_of_single_weights():
    rows = [
        *layer(FORWARD_BACKWARD, 2.0),
        *layer(FORWARD_BACKWARD, 0.96, kind="last", label="another"),
        *layer(FORWARD, 1.2),
        *layer(FORWARD, 0.96, label="another"),
        *layer(READ, 0.5),
        *layer(FORWARD_BACKWARD, 6.1, kind="middle"),
        *layer(FORWARD_BACKWARD, 3.9, kind="whole"),
        *layer(FORWARD_BACKWARD, 1.9, dtype="bfloat16"),
        *layer(FORWARD, 0.1, dtype="bfloat16"),
        *layer(FORWARD, 0.1, kind="middle"),
        *layer(READ, 0.1, kind="whole"),
    ]
    table = printed(rows)
    assert table["float32, dims 0 and last"][:5] == [
        "2", "1.39", ">= 1.25 met", "0.96", ">= 0.97 missed",
    ]  # fmt: skip
    assert table["the same, forward"][:5] == ["2", "1.07", ">= 1.10 missed", "0.96", ">= 0.95 met"]
    assert table["the same, forward and reader"][:5] == ["1", "0.50", "", "0.50", ""]
    assert table["float32, middle dims"][:3] == ["1", "6.10", ">= 6.00 met"]
    assert table["float32, whole tensor"][:3] == ["1", "3.90", ">= 4.00 missed"]
    assert table["bfloat16, dims 0 and last"][:3] == ["1", "1.90", ">= 1.80 met"]


def test_models_count_where_torch_leaves_something_to_win():
    """1.5 times five arrays are 3.75 copies."""
    rows = [
        *measured("fused", {OURS: 2.5, TORCH: 5.0, COPY: 1.0}, phase=ALONE),
        *measured("fused", {OURS: 9.0, TORCH: 3.7, COPY: 1.0}, phase=ALONE, label="near the limit"),
        *measured("models", {OURS: 10.0, TORCH: 5.0, COPY: 1.0}, phase=ALONE),
        *measured("models", {OURS: 1.0, TORCH: 9.0, COPY: 1.0}, phase=STEP),
    ]
    table = printed(rows)
    assert table["models one by one, torch over 1.5 limits"][:4] == [
        "2", "1.00", ">= 1.30 missed", "0.50",
    ]  # fmt: skip
    assert table["models, training step, one by one"][:3] == ["1", "9.00", ""]


def test_large_models_are_held_against_the_limit():
    times = {TORCH: 9.0, OURS: 4.0, FUSED: 3.0, VERSION: 3.1, UNCHANGED: 2.0, COPY: 1.0}
    large = measured("fused", times, phase=ALONE, numel=16 * 10**6)
    small = measured("fused", {**times, FUSED: 8.0}, phase=ALONE, label="ParallelWaveGAN")
    table = printed([*large, *small])
    assert table["the same, fused"][5:7] == ["1.20", "<= 1.20 met"]
    assert table["ParallelWaveGAN, fused"][1:3] == ["1.12", ">= 2.00 missed"]


def test_a_summary_names_its_cpu():
    rows = [dataclasses.replace(r, device="Some CPU") for r in layer(FORWARD, 1.0)]
    out = io.StringIO()
    summary.print_summary(Console(file=out, width=200), rows)
    assert out.getvalue().startswith("Summary: times as fast as torch on Some CPU")


def test_losses_come_first_and_the_folder_last(monkeypatch, tmp_path):
    rows = [
        *measured("operators", {OURS: 1.25, TORCH: 1.0}, faults={TORCH: 512.0, OURS: 3.0}),
        *measured("host", {OURS: 1.0, TORCH: 2.0, UNCHANGED: 4.0}),
    ]
    monkeypatch.setattr(benchmark, "_jobs", lambda *args: [Job("all", lambda: rows)])
    told = CliRunner().invoke(benchmark.app, ["--out", str(tmp_path)])
    assert told.exit_code == 0, told.output
    losses, one_call, host, summed, took = (
        told.output.index(head)
        for head in (
            "Where we lose: 2 of 3 cases",
            "One call of the operator",
            "Host cost of one layer.weight",
            "Summary",
            "Took ",
        )
    )
    assert losses < one_call < host < summed < took
    lost = [line for line in told.output[losses:one_call].splitlines() if "8x4" in line]
    assert ["unchanged" in line for line in lost] == [True, False]  # the worst first
    assert "0.80 │      512 / 3" in lost[1]
    last = " ".join(told.output.partition("Took ")[2].split())
    assert last.endswith(f"benchmarks/results/{results_folder(environment('cpu', None))}.")


def test_calls_of_the_operator_beside_the_engine():
    plan = dataclasses.replace(QUICK, host_budget_s=0.0)
    rows = layers.run_calls(plan, environment("cpu", None))
    assert [(r.phase, r.contender) for r in rows] == [
        *((layers.RECORDED, who) for who in (OURS, TORCH)),
        *((layers.NO_GRAD, who) for who in (OURS, TORCH)),
        *((layers.BACKWARD, who) for who in (OURS, TORCH, ENGINE)),
    ]
    table = printed([r for r in rows if r.contender != ENGINE])
    assert table["one call, 64 elements"][0] == "3"
    assert printed(rows) == table


def test_what_the_engine_is_asked_for_is_no_arithmetic():
    """It hands the very tensor that it is given to both leaves."""
    grad_w = torch.randn(8, 8)
    for grad in layers.of_nothing(torch.randn(8, 8, requires_grad=True), grad_w)():
        assert torch.equal(grad, grad_w)
