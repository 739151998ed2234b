"""Every kind of kernel once, and what a profiler looks at, on a CPU."""

from __future__ import annotations

import pytest

pytest.importorskip("typer", reason="the command line of the benchmark needs typer")
pytest.importorskip("rich", reason="the tables of the benchmark need rich")

from typer.testing import CliRunner

from benchmarks.gpu.plan import TINY, Part
from tools.gpu_check import profiling, smoke

from ..on_the_cpu import on_the_cpu
from .stand_ins import eager_is_ours

__all__ = ["eager_is_ours", "on_the_cpu"]


def small_smoke(monkeypatch):
    monkeypatch.setattr(smoke, "SHAPES", (((6, 5, 3), (0, 1, 2, None)),))
    monkeypatch.setattr(smoke, "backends", lambda v: ["eager"])
    arguments = ["--device", "cpu", "--backend", "eager", "--dtype", "float32"]
    return CliRunner().invoke(smoke.app, arguments)


def test_every_case_of_the_smoke_test_is_right_or_not(monkeypatch, eager_is_ours):
    result = small_smoke(monkeypatch)
    assert result.exit_code == 0
    assert result.output.count("OK   eager float32") == 6
    assert "6 weight norms on eager are right, 0 wrong" in result.output
    right = type(eager_is_ours).weights

    def wrong(self, problems):
        w, norms = right(self, problems)
        return [1.01 * x if p.dim == 1 else x for x, p in zip(w, problems, strict=True)], norms

    monkeypatch.setattr(type(eager_is_ours), "weights", wrong)
    result = small_smoke(monkeypatch)
    assert result.exit_code == 1
    assert "FAIL eager float32 [6, 5, 3] dim 1: VerificationError" in result.output
    assert "OK   eager float32 [6, 5, 3] dim None" in result.output  # it goes on
    assert "4 weight norms on eager are right, 2 wrong" in result.output


def test_a_smoke_test_on_a_device_that_fails_ends(monkeypatch, eager_is_ours):
    def fault(self, problems):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(type(eager_is_ours), "weights", fault)
    monkeypatch.setattr(smoke, "is_usable", lambda device: False)
    result = small_smoke(monkeypatch)
    assert result.exit_code == 1
    assert "illegal memory access" in result.output
    assert "0 weight norms on eager are right, 1 wrong" in result.output


def test_a_smoke_test_without_kernels_says_so():
    arguments = ["--device", "cpu", "--backend", "cuda", "--dtype", "float32"]
    result = CliRunner().invoke(smoke.app, arguments)
    assert result.exit_code == 2
    assert "cuda was asked for" in result.output


def test_what_a_profiler_looks_at_runs(monkeypatch, capsys):
    small = {c.shape: c for c in profiling.LISTS[2]}
    monkeypatch.setattr(profiling, "LISTS", ([TINY.weights[Part.KEY][0]], list(small.values())[:2]))
    profiling.launch("cpu")
    assert capsys.readouterr().out == "3 weight norms, forward and backward\n"
