"""``wnkernel bench``: what is measured, that it is right, and how it is told. No times."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os

import pytest
import torch
from torch import nn

import wnkernel
from benchmarks import verify

pytest.importorskip("typer", reason="the command line needs typer")

from wnkernel.backends import BACKENDS
from wnkernel.cli import bench, cases, other_work, timing
from wnkernel.cli.cases import Case

from ..command_line import DIMS, WEIGHTS, fails, files_in, invoke, on_the_cpu, save, trained

__all__ = ["on_the_cpu"]

SMALL = ("--shape", "6x5x3")
RUNNING = [name for name, b in BACKENDS.items() if not b.reasons(torch.empty(1, device="cpu"))]
HERE = [name for name in RUNNING if name != "triton"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Few calls, and none of kernels that an interpreter runs."""
    monkeypatch.setattr(timing, "MIN_SAMPLE_S", 0.0)
    monkeypatch.setattr(bench, "BACKENDS", {name: BACKENDS[name] for name in HERE})


def measured(*arguments):
    """``wnkernel bench --json``, which has to succeed."""
    result = invoke("bench", "--seconds", "0", "--json", *arguments)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_every_backend_that_runs_and_torch_in_both_phases(monkeypatch):
    monkeypatch.setattr(bench, "BACKENDS", BACKENDS)
    said = measured(*SMALL)
    assert said["torch"] == torch.__version__
    assert said["threads"] == torch.get_num_threads()
    results = said["results"]
    assert [(r["phase"], r["contender"]) for r in results] == [
        (phase, name) for phase in ("forward", "forward+backward") for name in ["torch", *RUNNING]
    ]
    for r in results:
        assert (r["shape"], r["dim"], r["dtype"], r["layers"]) == ("6x5x3", "0", "float32", 1)
        assert 0 < r["p20_ms"] <= r["median_ms"] <= r["p80_ms"]
        assert r["rounds"] >= 3
        assert 0 < r["error"] < 1e-5
        assert r["automatic"] == (r["contender"] == HERE[0])
        torchs = next(t for t in results if t["phase"] == r["phase"])
        assert r["times_torch"] == pytest.approx(torchs["median_ms"] / r["median_ms"])


def test_shapes_dims_and_dtypes():
    said = measured("--shape", "4x3", "--shape", "2X3x4", "--dim", "none", "--dim", "-2")
    found = dict.fromkeys((r["shape"], r["dim"]) for r in said["results"])
    assert list(found) == [("4x3", "none"), ("2x3x4", "1")]
    for dtype in ("float16", "bfloat16", "float64"):
        said = measured(*SMALL, "--dim", "1", "--dtype", dtype)
        assert {(r["dtype"], r["dim"]) for r in said["results"]} == {(dtype, "1")}


def test_rows_of_one_element_whose_gradient_of_v_is_nothing_but_rounding(tmp_path):
    said = measured("--shape", "64x1x1", "--shape", "8", "--shape", "1x1", "--shape", "1x6x1")
    assert {r["contender"] for r in said["results"]} == {"torch", *HERE}
    assert max(r["error"] for r in said["results"]) < 1e-5
    save({"weight_g": torch.ones(6, 1, 1), "weight_v": torch.ones(6, 1, 1)}, tmp_path / "in.pt")
    assert measured("--from", tmp_path / "in.pt")["results"][0]["shape"] == "6x1x1"


@pytest.mark.parametrize(("shape", "dim"), [((64, 1, 1), 0), ((8,), 0), ((1, 1), None)])
def test_rows_of_one_element_in_the_other_benchmarks(shape, dim):
    v, grad_w = torch.randn(2, *shape).unbind()
    v.requires_grad_()
    g = torch.rand(v.shape if dim == 0 else ()).requires_grad_()
    w = wnkernel.functional.weight_norm(v, g, dim)
    grad_v, grad_g = torch.autograd.grad(w, (v, g), grad_w)
    want = verify.reference(v, g, dim, grad_w)
    verify.check("ours", (w, grad_v, grad_g), want, long_sums=False)
    wrong = grad_v + 1e-3 * grad_w
    with pytest.raises(verify.VerificationError, match="grad_v is wrong"):
        verify.check("ours", (w, wrong, grad_g), want, long_sums=False)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_weight_norms_of_a_checkpoint(tmp_path, suffix):
    state = trained("legacy").state_dict()
    state["pre.weight_v"] = state["pre.weight_v"].double()
    save(state, tmp_path / f"in{suffix}")
    if suffix == ".pt":
        optimizer = torch.optim.Adam(nn.Linear(1, 1).parameters()).state_dict()
        torch.save({"deep": [{"model": state}], "opt": optimizer}, tmp_path / "in.pt")
    found = {
        (r["shape"], r["dim"], r["dtype"]): r["layers"]
        for r in measured("--from", tmp_path / f"in{suffix}")["results"]
    }
    expected = {}
    for (weight, shape), dim in zip(WEIGHTS.items(), DIMS, strict=True):
        dtype = "float64" if weight == "pre.weight" else "float32"
        kind = ("x".join(map(str, shape)), "none" if dim is None else str(dim), dtype)
        expected[kind] = expected.get(kind, 0) + 1
    assert found == expected
    said = measured("--from", tmp_path / f"in{suffix}", "--dtype", "float32", *SMALL)
    assert {r["dtype"] for r in said["results"]} == {"float32"}
    assert said["results"][0]["shape"] == "6x5x3"


def test_the_table_and_the_csv_have_every_case(tmp_path):
    target = tmp_path / "out.csv"
    arguments = ("bench", *SMALL, "--shape", "3x2", "--seconds", "0", "--csv", target)
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    rows = [[c.strip() for c in line.split("│")] for line in result.stdout.splitlines()]
    rows = [row[1:6] for row in rows if len(row) > 6]
    assert rows == [
        [shape, "0", "float32", "1", phase]
        for shape in ("6x5x3", "3x2")
        for phase in ("forward", "forward+backward")
    ]
    assert "all layers, forward:" in result.stdout
    with target.open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * 2 * (1 + len(HERE))
    assert {line["contender"] for line in lines} == {"torch", *HERE}
    before = files_in(tmp_path)
    assert "exists already" in fails(4, *arguments)
    assert "is the input" in fails(2, *arguments, "--from", target, "--force")
    assert files_in(tmp_path) == before


def never(*_):
    raise AssertionError("timed")


def wrong_values(weight_norm):
    return lambda v, g, dim, **_: weight_norm(v, g, dim) * (1 + 3e-5)


def wrong_gradients(weight_norm):
    def same_values(v, g, dim, **_):
        return weight_norm(v, g, dim) + 0.01 * (g.sum() - g.sum().detach())

    return same_values


@pytest.mark.parametrize("wrong", [wrong_values, wrong_gradients])
def test_nothing_of_ours_is_timed_that_is_wrong(monkeypatch, wrong):
    monkeypatch.setattr(bench, "measure", never)
    broken = wrong(wnkernel.functional.weight_norm)
    monkeypatch.setattr(wnkernel.functional, "weight_norm", broken)
    line = fails(5, "bench", *SMALL)
    assert f"6x5x3 dim 0 float32: backend {HERE[0]!r} is off by" in line
    assert "nothing was timed" in line


def raises(_):
    def no_kernel(*_):
        raise RuntimeError("not implemented for 'Half'")

    return no_kernel


@pytest.mark.skipif(set(HERE) == {"eager"}, reason="nothing runs here but torch's own operators")
@pytest.mark.parametrize("wrong", [wrong_values, wrong_gradients, raises])
def test_torch_is_left_out_where_it_is_wrong_or_does_not_run(monkeypatch, wrong):
    monkeypatch.setattr(torch, "_weight_norm", wrong(torch._weight_norm))
    monkeypatch.setattr(bench, "_contenders", without_eager(bench._contenders))
    results = measured(*SMALL)["results"]
    assert {r["contender"] for r in results} == set(HERE) - {"eager"}
    assert {r["times_torch"] for r in results} == {None}
    shown = invoke("bench", "--seconds", "0", *SMALL)
    cells = [c.strip() for c in shown.stdout.split("forward+backward")[1].split("│")]
    assert cells[1] == cells[-2] == "-"


def without_eager(contenders):
    """It computes with torch's operator."""
    return lambda v, dim: [(n, c) for n, c in contenders(v, dim) if n != "eager"]


def test_contenders_take_turns_in_their_contexts():
    calls, inside = [], []

    @contextlib.contextmanager
    def context():
        inside.append(True)
        yield
        inside.pop()

    def contender(name):
        return timing.Contender(context, lambda: calls.append((name, len(inside))))

    names = "abc"
    times = timing.measure({n: contender(n) for n in names}, torch.device("cpu"), 0.0)
    assert list(times) == list(names)
    rounds = calls[-3 * timing.MIN_ROUNDS :]
    for k in range(0, len(rounds), 3):
        assert sorted(rounds[k : k + 3]) == [(n, 1) for n in names]
    assert {t.rounds for t in times.values()} == {timing.MIN_ROUNDS}


def test_a_busy_machine_is_said_to_be_one(monkeypatch):
    assert other_work.disturbed(os.cpu_count(), 1)
    assert not other_work.disturbed(0.0, os.cpu_count())
    assert not other_work.disturbed(math.nan, os.cpu_count())
    monkeypatch.setattr(other_work.OtherWork, "cores", lambda self: 99.0)
    shown = invoke("bench", "--seconds", "0", *SMALL)
    assert "other processes used up to 99.0 cores" in shown.stdout
    monkeypatch.setattr(other_work.OtherWork, "cores", lambda self: 0.0)
    assert "other processes" not in invoke("bench", "--seconds", "0", *SMALL).stdout


def test_where_the_system_does_not_tell_of_other_work_nothing_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(other_work, "_STAT", tmp_path / "stat")
    assert {r["other_cores"] for r in measured(*SMALL)["results"]} == {None}
    assert "other processes" not in invoke("bench", "--seconds", "0", *SMALL).stdout


def test_what_makes_no_sense_is_wrong_usage():
    for arguments, said in (
        (["--shape", "3x0"], "--shape: expected sizes"),
        (["--shape", "3,4"], "--shape: expected sizes"),
        (["--shape", "9" * 25 + "x2"], "--shape: expected sizes"),
        (["--shape", "9" * 5000], "--shape: expected sizes"),
        (["--shape", "9" * 18 + "x" + "9" * 18], "dim 0 float32: "),
        (["--shape", "3x4", "--dim", "2"], "--dim: expected none or a dimension of 3x4"),
        (["--shape", "3x4", "--dim", "x"], "--dim: expected none or a dimension of 3x4"),
        (["--shape", "3", "--shape", "4", *(["--dim", "0"] * 3)], "--dim: expected one, or 2"),
        (["--dim", "0"], "--dim: expected a --shape"),
        (["--dtype", "int8"], "--dtype: expected one of"),
        (["--device", "nonsense"], "--device: 'nonsense' cannot be used"),
        (["--device", "meta"], "--device: meta"),
    ):
        assert said in fails(2, "bench", *arguments)


def test_what_does_not_fit_into_memory():
    line = fails(6, "bench", "--shape", "99999999x99999999")
    assert "99999999x99999999 dim 0 float32: out of memory: 39999999200000004 bytes" in line


def test_a_checkpoint_without_weight_norm_or_with_half_of_one(tmp_path):
    save({"weight": torch.ones(3, 4)}, tmp_path / "in.pt")
    assert "has no weight norm" in fails(1, "bench", "--from", tmp_path / "in.pt")
    save({"parametrizations.weight.original0": torch.ones(3, 1)}, tmp_path / "in.pt")
    assert "original1" in fails(3, "bench", "--from", tmp_path / "in.pt")
    assert "No such file" in fails(3, "bench", "--from", tmp_path / "no.pt")
    (tmp_path / "out.csv").touch()
    arguments = ("bench", "--from", tmp_path / "no.pt", "--csv", tmp_path / "out.csv", "--force")
    assert "no.pt: No such file" in fails(3, *arguments)


def test_without_arguments_a_few_shapes_are_timed(monkeypatch):
    asked = []
    monkeypatch.setattr(bench, "run", lambda case, *_: asked.append(case) or [])
    assert invoke("bench", "--json").exit_code == 0
    assert asked[-1] == Case((768, 48, 128), 2, torch.float32)
    assert len(asked) == len(cases.DEFAULT_SHAPES)
