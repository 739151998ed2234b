"""Rows scaled in place in the benchmark: the sets, who is verified, who is compared with whom."""

from __future__ import annotations

import dataclasses
import io
import math

import pytest
import torch
from rich.console import Console
from torch._dynamo.exc import BackendCompilerFailed

from benchmarks import forced, normalize, report, summary
from benchmarks.contenders import COMPILED, FOREACH, FUSED, LEAST, OURS, READ_WRITE, TORCH
from benchmarks.environment import environment
from benchmarks.normalize import EDM2, HYPERBALL, NGPT, TensorSet
from benchmarks.plan import DEFAULT, FULL, QUICK
from benchmarks.results import FORCED, FORCED_BACKWARD, IN_PLACE, by_subject
from benchmarks.shapes import NORMALIZED, LayerCase, grid, weight_list
from benchmarks.verify import VerificationError

from ..on_the_cpu import on_the_cpu
from .benchmark_rows import measured

__all__ = ["on_the_cpu"]

PLAN = dataclasses.replace(QUICK, normalize_budget_s=0.0)
SETS = {
    "ngpt": TensorSet("here", [LayerCase((6, 5), d, "", "") for d in (0, 1)], NGPT),
    "edm2": TensorSet("here", [LayerCase(s, 0, "", "") for s in ((6, 5), (4, 3, 3, 3))], EDM2),
    "hyperball": TensorSet("here", [LayerCase((6, n), None, "", "") for n in (5, 7)], HYPERBALL),
}
BF16 = dataclasses.replace(SETS["ngpt"], dtype=torch.bfloat16)
WHERE = environment("cpu", None)


def run(of, plan=PLAN, report=pytest.fail):
    return {r.contender: r for r in normalize.run(of, plan, WHERE, report)}


def test_the_models_are_those_of_the_papers():
    """EDM2-S has 280.2 M parameters; nGPT has 16 d^2 in a layer, and d = 1024."""
    ngpt, edm2 = (weight_list(name) for name in NORMALIZED)
    assert len(ngpt) == 12 * 6
    assert sum(c.numel for c in ngpt) == 12 * 16 * 1024**2
    assert len(edm2) == 161
    assert sum(c.numel for c in edm2) == 280_212_672


def test_weights_without_weight_norm_are_in_no_other_case():
    assert not {c.label.split(" +")[0] for c in grid()} & set(NORMALIZED)
    only_there = {(c.shape, c.dim) for name in NORMALIZED for c in weight_list(name)}
    assert not {(c.shape, c.dim) for c in grid()} & only_there


def test_quick_runs_have_the_matrices_alone():
    matrices = [(normalize.MATRICES, d) for d in ("0", "1", "none")]
    assert [(s.label, s.dim_text) for s in normalize.sets(QUICK.normalize_models)] == matrices
    ngpt, edm2 = NORMALIZED
    found = [(s.label, s.dim_text) for s in normalize.sets(DEFAULT.normalize_models)]
    assert found == [*matrices, (ngpt, "0, 1"), (ngpt, "0, 1"), (edm2, "0")]


@pytest.mark.parametrize("of", [*SETS.values(), BF16], ids=[*SETS, "bfloat16"])
def test_all_contenders_are_verified_and_held_against_one_read_and_one_write(of):
    rows = run(of)
    foreach = [FOREACH] * (of.method is HYPERBALL)
    assert list(rows) == [OURS, TORCH, *foreach, READ_WRITE]
    numel = sum(c.numel for c in of.cases)
    yardstick = rows[READ_WRITE].median_ms
    for who, r in rows.items():
        assert (r.case, r.phase, r.shape) == ("normalize", IN_PLACE, "2 tensors")
        assert r.bytes == 2 * of.dtype.itemsize * numel
        assert (r.error >= 0) == (who != READ_WRITE), who
        if who == READ_WRITE:
            assert math.isnan(r.ratio_to_limit)
        else:
            assert r.ratio_to_limit == pytest.approx(r.median_ms / yardstick)


@pytest.mark.parametrize("of", SETS.values(), ids=SETS)
@pytest.mark.parametrize("factor", [1.0, 0.999])
def test_a_loop_that_is_wrong_in_one_row_is_refused(of, factor):
    def loop(weights):
        of.method.loop(weights)
        weights.tensors[-1][0] *= factor

    wrong = dataclasses.replace(of, method=dataclasses.replace(of.method, loop=loop))
    if factor == 1.0:
        run(wrong)
    else:
        with pytest.raises(VerificationError, match=r"torch, here, .* tensor 1: w"):
            run(wrong)


@pytest.mark.parametrize("of", SETS.values(), ids=SETS)
def test_what_leaves_the_step_as_it_is_is_refused(of, monkeypatch):
    monkeypatch.setattr(normalize.wnkernel, "normalize_", lambda *args, **options: None)
    with pytest.raises(VerificationError, match="wnkernel, here"):
        run(of)


def test_eps_of_the_published_loop_is_known():
    """It is 1e-4, which a norm in float32 would show."""
    exact = dataclasses.replace(SETS["edm2"], method=dataclasses.replace(EDM2, eps=0.0))
    with pytest.raises(VerificationError, match="torch, here"):
        run(exact)


def test_the_loop_runs_compiled_too(fresh_compiler):
    rows = run(SETS["hyperball"], dataclasses.replace(PLAN, normalize_compiled=True))
    assert list(rows) == [OURS, TORCH, FOREACH, TORCH + COMPILED, READ_WRITE]
    assert rows[TORCH + COMPILED].error >= 0


def test_without_a_compiler_the_others_are_measured(monkeypatch):
    def fails(loop, **options):
        def first_call(*args):
            raise BackendCompilerFailed(fails, RuntimeError("no C++ compiler"), None)

        return first_call

    monkeypatch.setattr(torch, "compile", fails)
    told = []
    plan = dataclasses.replace(PLAN, normalize_compiled=True)
    assert list(run(SETS["ngpt"], plan, told.append)) == [OURS, TORCH, READ_WRITE]
    (note,) = told
    assert note.startswith("torch.compile skipped: ")


EDM2_LAYERS = [LayerCase((6, 5), 0, "", "Linear"), LayerCase((4, 3, 3, 3), 0, "", "Conv2d")]


def run_forced(cases=EDM2_LAYERS, plan=PLAN):
    found = by_subject(forced.run("here", cases, plan, WHERE, pytest.fail))
    assert [m[OURS].phase for m in found] == [FORCED, FORCED_BACKWARD]
    return found


@pytest.mark.parametrize(
    ("cases", "shape"),
    [(EDM2_LAYERS, "2 layers"), (EDM2_LAYERS[1:], "4x3x3x3")],
    ids=["list", "one"],
)
def test_forced_weights_are_verified_and_held_against_as_many_bytes(cases, shape):
    for rows, arrays in zip(run_forced(cases), (3, 6), strict=True):
        assert {*rows} == {OURS, TORCH, LEAST, *[FUSED] * (len(cases) > 1)}
        array_bytes = 4 * sum(c.numel for c in cases)
        yardstick = rows[LEAST]
        assert yardstick.bytes == arrays * array_bytes
        assert math.isnan(yardstick.error)
        for r in (r for who, r in rows.items() if who != LEAST):
            assert (r.shape, r.bytes, r.error >= 0) == (shape, arrays * array_bytes, True)
            assert r.ratio_to_limit == pytest.approx(r.median_ms / yardstick.median_ms)


@pytest.fixture
def forced_reads():
    """The contenders without a compiler on two layers, and the parameters."""
    vs = [torch.nn.Parameter(torch.randn(c.shape)) for c in EDM2_LAYERS]
    return vs, forced.readers(vs, EDM2_LAYERS)


def test_the_contenders_share_parameters_and_only_the_group_has_one_node(forced_reads):
    vs, reads = forced_reads
    assert {who: len({w.grad_fn for w in read()}) for who, read in reads.items()} == {
        OURS: 2,
        TORCH: 2,
        FUSED: 1,
    }
    for read in reads.values():
        with torch.no_grad():
            torch._foreach_mul_(vs, 2.0)
        read()
        assert all(abs(v.square().mean() - 1) < 1e-3 for v in vs)


class WrongGradient(torch.autograd.Function):
    """Changes only the gradient of its input, in one row."""

    @staticmethod
    def forward(ctx, w):
        return w.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.cat([grad[:1] * 0.999, grad[1:]])


def _scaled_row(w):
    return torch.cat([w[:1] * 0.999, w[1:]])


@pytest.mark.parametrize(
    ("wrong", "what"), [(_scaled_row, "w"), (WrongGradient.apply, "grad_v"), (None, "v")]
)
def test_published_code_that_is_wrong_in_one_row_is_refused(wrong, what, monkeypatch):
    right = forced.edm2_weights

    def weights(vs):
        found = right(vs)
        if wrong is None:
            vs[-1].data[0].mul_(0.999)  # unseen by autograd
            return found
        return [*found[:-1], wrong(found[-1])]

    monkeypatch.setattr(forced, "edm2_weights", weights)
    with pytest.raises(VerificationError, match=rf"torch, here, layer 1: {what} is wrong"):
        run_forced()


def test_the_published_code_of_forced_weights_runs_compiled_too(fresh_compiler):
    forward, both = run_forced(plan=dataclasses.replace(PLAN, normalize_compiled=True))
    assert forward[TORCH + COMPILED].error >= 0
    assert TORCH + COMPILED not in both


def test_smaller_runs_name_their_part_of_edm2():
    titles = {
        size: [job.title for job in forced.jobs(size, WHERE, pytest.fail)]
        for size in (QUICK, DEFAULT, FULL)
    }
    assert {t[0] for t in titles.values()} == {"forced one layer of EDM2-S"}
    assert [t[1] for t in titles.values()] == [
        "forced EDM2-S, 1 layer in 32",
        "forced EDM2-S, 1 layer in 4",
        "forced EDM2-S",
    ]


def printed(show, *rows):
    out = io.StringIO()
    show(Console(file=out, width=200), [r for found in rows for r in found])
    return [[cell.strip() for cell in line.split("│")] for line in out.getvalue().splitlines()]


TIMES = {OURS: 2.0, TORCH: 8.0, TORCH + COMPILED: 3.0, READ_WRITE: 1.0}


def test_the_table_compares_with_the_best_other():
    rows = [
        measured("normalize", ms, label=label, phase=IN_PLACE, limit=READ_WRITE)
        for label, ms in (("set", TIMES), ("whole", {**TIMES, FOREACH: 1.0}))
    ]
    table = {cells[1]: cells[3:] for cells in printed(report.print_results, *rows) if cells[1:]}
    medians, of_set = slice(0, 5), table["set"]
    assert of_set[medians] == ["2.00", "8.00", "", "3.00", "1.00"]
    assert of_set[5:7] == ["1.50", "2.00"]
    of_whole = table["whole"]
    assert of_whole[medians] == ["2.00", "8.00", "1.00", "3.00", "1.00"]
    assert of_whole[5:7] == ["0.50", "2.00"]


def test_the_table_of_forced_weights_compares_the_group():
    times = {OURS: 4.0, FUSED: 2.0, TORCH: 8.0, TORCH + COMPILED: 3.0, LEAST: 1.0}
    faults = {FUSED: 5.0, TORCH: 70.0}
    rows = measured("normalize", times, label="set", phase=FORCED, limit=LEAST, faults=faults)
    (cells,) = [c for c in printed(report.print_results, rows) if "set" in c]
    assert cells[3:8] == ["4.00", "2.00", "8.00", "3.00", "1.00"]
    assert [cells[8], cells[9], cells[11]] == ["1.50", "2.00", "70 / 5"]


def test_whoever_is_faster_makes_a_loss():
    rows = [measured("normalize", TIMES, label="won"), measured("normalize", {**TIMES, OURS: 4.0})]
    (lost,) = [c for c in printed(summary.print_losses, *rows) if "normalize" in c]
    assert lost[8:11] == ["4", "3", "0.75"]
