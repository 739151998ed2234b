"""torch.compile in the benchmark: who is verified, and what is printed of whole models."""

from __future__ import annotations

import dataclasses
import io

import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks import compiled, fused, models, report, summary
from benchmarks.contenders import BY_CASE, COMPILED, COPY, FUSED, LEGACY, OURS, PLAIN, TORCH
from benchmarks.environment import environment
from benchmarks.models import Entry
from benchmarks.plan import QUICK
from benchmarks.results import ALONE, STEP
from benchmarks.shapes import LayerCase
from benchmarks.verify import VerificationError

from ..on_the_cpu import on_the_cpu
from .benchmark_rows import measured

__all__ = ["on_the_cpu"]

ALL = (*BY_CASE["compile"], COPY)
QUICK_STEPS = dataclasses.replace(QUICK, step_budget_s=0.0)


@pytest.fixture
def small_model(monkeypatch):
    cases = [LayerCase((6, 4, 3), 0, "here", "Conv1d"), LayerCase((4, 6, 3), 1, "here", "Conv1d")]
    monkeypatch.setattr(compiled, "weight_list", {"small": cases}.get)


def test_all_contenders_are_verified_and_compiled_ones_say_how_long_they_took(small_model):
    where = dataclasses.replace(environment("cpu", None), threads=1)
    plan = dataclasses.replace(QUICK, compile_model_budget_s=0.0)
    rows = {r.contender: r for r in compiled.run_model("small", plan, where)}
    assert tuple(rows) == ALL
    for who, r in rows.items():
        assert (r.label, r.threads, r.phase) == ("small, 1 thread", 1, ALONE)
        assert (r.error >= 0) == (who != COPY), who
        assert (r.compile_s > 0) == who.endswith(COMPILED), who


def test_models_are_compiled_on_one_thread_and_on_all(monkeypatch):
    ran = []

    def run(case, label, cases, budget_s, where):
        ran.append((label, where.threads))
        return []

    monkeypatch.setattr(fused, "compare", run)
    plan = dataclasses.replace(QUICK, compile_layers=0, compile_models=("DAC",))
    for threads in (1, 3):
        where = dataclasses.replace(environment("cpu", None), threads=threads)
        for job in compiled.jobs(plan, where, pytest.fail):
            job.run()
    assert ran == [("DAC, 1 thread", 1), ("DAC, 1 thread", 1), ("DAC, 3 threads", 3)]


@pytest.fixture
def small_net(monkeypatch):
    """In the place of a model of the transformers package."""
    torch.manual_seed(0)
    layers = [nn.Conv1d(4, 6, 3), nn.Tanh(), nn.Conv1d(6, 4, 3)]
    for layer in layers[::2]:
        nn.utils.parametrizations.weight_norm(layer)
    net = nn.Sequential(*layers)
    entry = Entry("small", "", (2, 4, 9), lambda m, x: m(x), False)
    monkeypatch.setitem(models.BY_NAME, "small", entry)
    monkeypatch.setattr(compiled, "build", lambda name, device: net)
    return net


def test_training_steps_are_eager_and_compiled(small_net, fresh_compiler):
    rows = compiled.run_steps("small", QUICK_STEPS, environment("cpu", None))
    assert [r.contender for r in rows] == [
        who + how for who in (TORCH, OURS, FUSED, PLAIN) for how in ("", COMPILED)
    ]
    for r in rows:
        assert (r.label, r.phase, r.shape) == ("small", STEP, "2 layers")


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (lambda y: 2 * y, "output"),
        (lambda y: 2 * y - y.detach(), "grad_v"),
    ],
)
def test_training_steps_that_differ_are_an_error(small_net, monkeypatch, wrong, what):
    monkeypatch.setattr(torch, "compile", lambda forward, **_: lambda: wrong(forward()))
    with pytest.raises(VerificationError, match=f"torch, compiled, small: {what}"):
        compiled.run_steps("small", QUICK_STEPS, environment("cpu", None))


def test_training_steps_without_transformers(monkeypatch):
    monkeypatch.setattr(compiled, "available", lambda: False)
    plan = dataclasses.replace(QUICK, compile_layers=0, compile_steps=("DacModel",))
    notes = []
    assert compiled.jobs(plan, environment("cpu", None), notes.append) == []
    assert notes == ["Training step with torch.compile skipped: transformers is not installed."]


def shown(print_results, **ms):
    times = {who: 4.0 for who in ALL} | {TORCH: 8.0, **ms}
    out = io.StringIO()
    print_results(Console(file=out, width=200), measured("compile", times, phase=ALONE))
    return [[cell.strip() for cell in line.split("│")] for line in out.getvalue().splitlines()]


def test_every_contender_has_a_row():
    lines = shown(report.print_results, **{FUSED + COMPILED: 2.0, LEGACY: 16.0})
    rows = {cells[2]: cells[3:6] for cells in lines if len(cells) > 6}
    assert tuple(who for who in rows if who) == BY_CASE["compile"]
    assert rows[FUSED + COMPILED] == ["2.00", "4.00", "2.00"]
    assert rows[LEGACY] == ["16.0", "0.50", "0.25"]


def test_what_is_compiled_has_to_be_faster_than_the_better_of_torch():
    lines = shown(summary.print_losses, **{OURS: 5.0, OURS + COMPILED: 5.0, FUSED + COMPILED: 3.9})
    (lost,) = [cells for cells in lines if "compile" in cells]
    assert lost[3] == OURS + COMPILED
    assert lost[8:11] == ["5", "4", "0.80"]
