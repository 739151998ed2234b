"""The GPU benchmark as far as a CPU can tell: bytes, graphs, checks and files."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import io
import itertools
import math
import sys
import types

import pytest
import torch

pytest.importorskip("typer", reason="the command line of the benchmark needs typer")
pytest.importorskip("rich", reason="the tables of the benchmark need rich")

from rich.console import Console
from typer.testing import CliRunner

from benchmarks.contenders import COPY, FUSED, OURS, TORCH
from benchmarks.environment import environment
from benchmarks.gpu import __main__ as benchmark
from benchmarks.gpu import cases, raw, single, summary
from benchmarks.gpu.cases import Began, Failed, Finished, Request, Section
from benchmarks.gpu.plan import FIRST, KEY, LARGE_BYTES, REAL, TINY, Part
from benchmarks.gpu.raw import BACKWARD, FORWARD
from benchmarks.results import Result
from wnkernel import backends
from wnkernel.backends import BACKENDS
from wnkernel.problem import check

from ..on_the_cpu import on_the_cpu
from .stand_ins import eager_is_ours

__all__ = ["eager_is_ours", "on_the_cpu"]

CPU = torch.device("cpu")


def problem(shape, dim):
    g = [n if k == dim else 1 for k, n in enumerate(shape)] if dim is not None else ()
    return check(torch.empty(shape), torch.empty(g), dim)


@pytest.mark.parametrize(
    ("shape", "dim", "arrays"),
    [
        ((8, 64, 3), 0, (2, 3)),  # short contiguous rows
        ((2, 8192), 0, (2, 3)),
        ((2, 8193), 0, (3, 5)),  # longer than what stays on the chip
        ((64, 128), None, (2, 3)),
        ((65, 128), None, (3, 5)),
        ((8, 4, 3), 1, (3, 5)),  # rows that are not contiguous
        ((8, 4), 1, (3, 5)),
    ],
)
def test_the_bytes_of_a_weight_norm(shape, dim, arrays):
    p = problem(shape, dim)
    assert tuple(raw.arrays(phase, p, object()) for phase in (FORWARD, BACKWARD)) == arrays


def test_a_backend_may_say_itself_what_stays_on_the_chip():
    class Backend:
        def fits_on_chip(self, p):
            return p.dim == 1

    for dim, arrays in ((0, (3, 5)), (1, (2, 3))):
        p = problem((8, 4), dim)
        assert tuple(raw.arrays(phase, p, Backend()) for phase in (FORWARD, BACKWARD)) == arrays


def test_the_launches_of_a_model(monkeypatch):
    """The second ones are for rows that are split, which no listed model has."""
    names = [name for models in REAL.models.values() for name in models]
    assert {raw.model_launches(name, "triton") for name in names} == {2}
    assert raw.model_launches("DAC", "another") == 4  # at most
    models = {Part.KEY: {"split": REAL.weights[Part.KEY][: len(KEY)]}}
    monkeypatch.setattr(raw, "REAL", dataclasses.replace(REAL, models=models))
    assert raw.model_launches("split", "triton") == 4


def test_the_real_plan_begins_with_what_the_aims_name():
    first = REAL.weights[Part.KEY]
    assert tuple((c.shape, c.dim) for c in first) == FIRST
    assert FIRST[: len(KEY)] == KEY
    every = [*first, *REAL.weights[Part.REST]]
    assert len({(c.shape, c.dim) for c in every}) == len(every)
    for size in (2, 4):  # bfloat16, float32
        large = [c for c in every if size * c.numel >= LARGE_BYTES]
        assert {"first", "last", "middle", "whole"} == {c.kind for c in large}
    assert set(REAL.models[Part.KEY]) == {"HiFi-GAN-V1", "DAC"}
    assert {"UnivNet", "VITS"} <= set(REAL.models[Part.REST])
    assert all(cases for models in REAL.models.values() for cases in models.values())
    assert min(REAL.copy_bytes) >= 2**30


class Sink(list):
    """The other side of the process of a benchmark, in this one."""

    send = list.append


def measured(folder, *sections: Section, backend: str = "") -> tuple[Sink, list[str]]:
    """Measures in this process; what it said to the other side, and what of ours failed."""
    said = Sink()
    for part in Part:
        chosen = sections or tuple(Section)
        cases.work(said, Request("cpu", backend, part, chosen, True, folder, math.inf))
    return said, [news.what for news in said if isinstance(news, Failed)]


@pytest.fixture(autouse=True)
def _interruptible(monkeypatch):
    """A process of a benchmark leaves interrupts to its parent; this one does not."""
    monkeypatch.setattr(cases.signal, "signal", lambda number, handler: None)


def test_a_dry_run_measures_every_section(tmp_path):
    said, failures = measured(tmp_path)
    assert failures == []
    assert [news.left_out for news in said if isinstance(news, Finished)] == ["", ""]
    rows: dict[str, list[Result]] = {}
    for r in summary.read(tmp_path):
        rows.setdefault(r.case, []).append(r)
    assert {"copy", "single", "whole", "host"} <= set(rows)
    assert rows["copy"][0].phase == "launch"
    here = environment("cpu", None)
    expected = {COPY, TORCH, *raw.makers(torch.empty(1), here.backend)}
    by_phase = itertools.groupby(rows["single"], key=lambda r: (r.dtype, r.shape, r.dim, r.phase))
    contenders = {key: {r.contender for r in group} for key, group in by_phase}
    weights = [c for part in Part for c in TINY.weights[part]]
    assert len(contenders) == 2 * 2 * len(weights)
    assert all(found == expected for found in contenders.values())
    assert {r.contender for r in rows["whole"]} == {TORCH, OURS, FUSED, COPY}
    assert {(r.device, r.commit, r.backend) for group in rows.values() for r in group} == {
        (here.device_name, here.commit, here.backend)
    }
    assert all(r.median_ms > 0 and r.rounds > 0 for r in rows["single"])
    forward, backward = (
        next(
            r
            for r in rows["single"]
            if (r.shape, r.phase, r.dtype, r.contender) == ("64x256", phase, "float32", TORCH)
        )
        for phase in (FORWARD, BACKWARD)
    )
    assert (forward.bytes, backward.bytes) == (2 * 4 * 64 * 256, 3 * 4 * 64 * 256)
    two_passes = [r for r in rows["single"] if (r.shape, r.dtype) == ("96x8x16", "float32")]
    arrays = {(r.phase, r.contender == COPY): r.bytes / 4 / r.numel for r in two_passes}
    assert arrays == {
        (FORWARD, False): pytest.approx(3, rel=1e-4),
        (BACKWARD, False): pytest.approx(5, rel=1e-4),
        (FORWARD, True): pytest.approx(2, rel=1e-4),
        (BACKWARD, True): pytest.approx(2, rel=1e-4),
    }


@pytest.mark.parametrize(("asked_for", "forced"), [("", None), ("eager", "eager")])
def test_the_automatic_choice_is_measured_as_users_have_it(
    monkeypatch, tmp_path, asked_for, forced
):
    """What is asked for by name does not go its short ways."""
    seen = []
    monkeypatch.setattr(cases, "_run", lambda *args: seen.append(backends.choice.forced))
    cases.work(Sink(), Request("cpu", asked_for, Part.KEY, (), True, tmp_path, math.inf))
    automatic = environment("cpu", None).backend
    cases.work(Sink(), Request("cpu", automatic, Part.KEY, (), True, tmp_path, math.inf))
    assert seen == [None if asked_for in ("", automatic) else forced, None]


def test_key_figures_that_were_not_measured_are_a_failure(tmp_path):
    told = ("--device", "cpu", "--tiny", "--limit-s", "0", "--no-summary", "--out", str(tmp_path))
    result = CliRunner().invoke(benchmark.app, [*told, "--part", "key"])
    assert result.exit_code == 1
    assert "0 rows, 1 failures; no time was left for 'launch' and what follows" in result.output


def test_the_command_line_measures_in_other_processes_and_sums_up(tmp_path):
    patient = ("--device", "cpu", "--tiny", "--limit-s", "1e6", "--out", str(tmp_path))
    result = CliRunner().invoke(benchmark.app, [*patient, "--only", "copy"])
    assert result.exit_code == 0, result.output
    assert "Copy " in result.output
    assert "2 rows, 0 failures" in result.output
    result = CliRunner().invoke(benchmark.app, [*patient, "--device", "nonsense"])
    assert result.exit_code == 2
    assert "nonsense" in result.output
    result = CliRunner().invoke(benchmark.app, [*patient, "--backend", "nonsense"])
    assert result.exit_code == 2
    assert "expected one of cpu, cuda, triton, eager" in " ".join(result.output.split())


def test_without_kernels_of_ours_the_reasons_are_told(tmp_path, capsys):
    measured(tmp_path, Section.SINGLE, backend="cuda")
    assert "No kernels of ours are measured: cuda: " in capsys.readouterr().out
    assert {r.contender for r in summary.read(tmp_path)} == {TORCH, COPY}
    out = io.StringIO()
    summary.print_summary(Console(file=out), summary.read(tmp_path))
    assert "No kernels of ours were measured" in out.getvalue()


def test_a_wrong_kernel_fails_its_cases_and_nobody_else(
    monkeypatch, eager_is_ours, tmp_path, capsys
):
    """The others of its cases are measured, and its other cases."""
    right = type(eager_is_ours).gradients

    def wrong(self, problems, *rest):
        grad_v, grad_g = right(self, problems, *rest)
        return [1.01 * t if problems[0].dim == 1 else t for t in grad_v], grad_g

    monkeypatch.setattr(type(eager_is_ours), "gradients", wrong)
    said, failures = measured(tmp_path, Section.COPY, Section.SINGLE, backend="eager")
    assert failures == [f"{t} 16x24x3 dim 1, wnkernel eager" for t in ("float32", "bfloat16")]
    told = capsys.readouterr().out
    assert "float32 16x24x3 dim 1: ContenderError: wnkernel eager: VerificationError" in told
    assert "FAILED: float32 16x24x3 dim 1, wnkernel eager" in told
    rows = [r for r in summary.read(tmp_path) if r.case == "single"]
    by_shape = {s: {r.contender for r in rows if r.shape == s} for s in {r.shape for r in rows}}
    assert by_shape.pop("16x24x3") == {TORCH, COPY}
    assert len(by_shape) == 3
    assert all(found == {TORCH, COPY, "wnkernel eager"} for found in by_shape.values())
    tries = [news.without for news in said if isinstance(news, Began) and "16x24x3" in news.title]
    assert tries == [[], ["wnkernel eager"]] * 2


def test_the_raw_calls_of_every_backend_give_the_same(eager_is_ours):
    t = raw.inputs(TINY.weights[Part.REST][1], torch.float32, CPU, 0)
    torchs = raw.of_torch(t, 1)
    for name in [n for n in BACKENDS if not BACKENDS[n].reasons(t.v)]:
        mine = raw.of_backend(name)(t, 1)
        torch.testing.assert_close(mine.forward()[0], torchs.forward()[0])
        torch.testing.assert_close(list(mine.backward()), list(torchs.backward()))


def fake_flag_gems(monkeypatch, **members):
    package = types.ModuleType(raw.FLAGGEMS_PACKAGE)
    package.__spec__ = importlib.machinery.ModuleSpec(raw.FLAGGEMS_PACKAGE, None)
    for name, member in members.items():
        setattr(package, name, member)
    monkeypatch.setitem(sys.modules, raw.FLAGGEMS_PACKAGE, package)


def test_flaggems_is_measured_beside_ours(monkeypatch, tmp_path, capsys):
    fake_flag_gems(
        monkeypatch,
        weight_norm_interface=torch._weight_norm_interface,
        weight_norm_interface_backward=torch.ops.aten._weight_norm_interface_backward,
    )
    monkeypatch.setattr(single, "FLAGGEMS_SHAPES", (((64, 256), 0),))
    assert measured(tmp_path, Section.FLAGGEMS)[1] == []
    found = summary.read(tmp_path)
    assert raw.FLAGGEMS in {r.contender for r in found}
    (forward, _) = summary.rival_lines(found)
    assert f"times {raw.FLAGGEMS}, 64x256 dim 0" in forward.title


def test_another_flaggems_is_left_out_with_a_plain_line(monkeypatch, tmp_path, capsys):
    fake_flag_gems(monkeypatch)
    assert measured(tmp_path, Section.FLAGGEMS)[1] == []
    told = capsys.readouterr().out
    assert "FlagGems left out: AttributeError" in told
    assert "Traceback" not in told


def test_a_flaggems_that_fails_does_not_take_ours_with_it(monkeypatch, tmp_path, capsys):
    def broken(*args):
        raise RuntimeError("no such kernel\nin some file")

    fake_flag_gems(monkeypatch, weight_norm_interface=broken, weight_norm_interface_backward=broken)
    monkeypatch.setattr(single, "FLAGGEMS_SHAPES", (((64, 256), 0),))
    assert measured(tmp_path, Section.FLAGGEMS)[1] == []  # it is not ours
    told = "FlagGems 64x256 dim 0: ContenderError: FlagGems: RuntimeError: no such kernel"
    assert told in capsys.readouterr().out
    assert TORCH in {r.contender for r in summary.read(tmp_path)}
