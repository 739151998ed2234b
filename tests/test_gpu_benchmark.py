"""The GPU benchmark as far as a CPU can tell: bytes, graphs, checks, files and the summary."""

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

from benchmarks import results
from benchmarks.gpu import __main__ as benchmark
from benchmarks.gpu import aims, flaggems, raw, sanitized, single, summary, traffic
from benchmarks.gpu.plan import KEY, LARGE_BYTES, REAL, TINY
from benchmarks.gpu.traffic import BACKWARD, FORWARD
from benchmarks.plan import Job
from benchmarks.results import COPY, FUSED, OURS, TORCH, Result
from benchmarks.timing import Stats
from benchmarks.verify import VerificationError
from wnkernel.backends import BACKENDS
from wnkernel.problem import check

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _on_the_cpu():
    with torch.device("cpu"):  # whatever device the other tests run on
        yield


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
    assert tuple(traffic.arrays(phase, p, object()) for phase in (FORWARD, BACKWARD)) == arrays


def test_a_backend_may_say_itself_what_stays_on_the_chip():
    class Backend:
        def fits_on_chip(self, p):
            return p.dim == 1

    for dim, arrays in ((0, (3, 5)), (1, (2, 3))):
        p = problem((8, 4), dim)
        assert tuple(traffic.arrays(phase, p, Backend()) for phase in (FORWARD, BACKWARD)) == arrays


def test_the_launches_of_a_model(monkeypatch):
    """The second ones are for rows that are split, which no listed model has."""
    assert {traffic.model_launches(name, "triton") for name in REAL.models} == {2}
    assert traffic.model_launches("DAC", "another") == 4  # at most
    models = {"split": REAL.weights[: len(KEY)]}
    monkeypatch.setattr(traffic, "REAL", dataclasses.replace(REAL, models=models))
    assert traffic.model_launches("split", "triton") == 4


def test_the_real_plan_begins_with_what_the_aims_name():
    assert tuple((c.shape, c.dim) for c in REAL.weights[: len(KEY)]) == KEY
    keys = [(c.shape, c.dim) for c in REAL.weights]
    assert len(keys) == len(set(keys))
    for size in (2, 4):  # bfloat16, float32
        large = [c for c in REAL.weights if size * c.numel >= LARGE_BYTES]
        assert {"first", "last", "middle", "whole"} == {c.kind for c in large}
    assert {"HiFi-GAN-V1", "DAC", "UnivNet", "VITS"} <= set(REAL.models)
    assert all(REAL.models.values())
    assert min(REAL.copy_bytes) >= 2**30


def invoke(folder, *arguments):
    patient = ("--limit-s", "1e6")  # or a busy machine would leave cases out
    arguments = ("--device", "cpu", "--tiny", *patient, "--out", str(folder), *arguments)
    return CliRunner().invoke(benchmark.app, arguments)


def test_a_dry_run_measures_every_section(tmp_path):
    result = invoke(tmp_path)
    assert result.exit_code == 0, result.output
    rows: dict[str, list[Result]] = {}
    for r in summary.read(tmp_path):
        rows.setdefault(r.case, []).append(r)
    assert {"copy", "single", "whole", "host"} <= set(rows)
    names = raw.backends(torch.empty(1))
    expected = {COPY, TORCH, *map(raw.ours, names)}
    by_phase = itertools.groupby(rows["single"], key=lambda r: (r.dtype, r.shape, r.dim, r.phase))
    measured = {key: {r.contender for r in group} for key, group in by_phase}
    assert len(measured) == 2 * 2 * len(TINY.weights)
    assert all(contenders == expected for contenders in measured.values())
    assert {r.backend for r in rows["single"] if r.contender != TORCH} >= set(names)
    assert {r.contender for r in rows["whole"]} == {TORCH, OURS, FUSED, COPY}
    assert all(r.median_ms > 0 and r.rounds > 0 and r.commit is not None for r in rows["single"])
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


@pytest.fixture
def eager_is_ours(monkeypatch):
    """The eager backend in the part of the only one with kernels."""
    monkeypatch.setattr(raw, "FALLBACK", "")
    backend = BACKENDS["eager"]
    monkeypatch.setattr(raw, "backends", lambda v: ["eager"])
    monkeypatch.setattr(single, "backends", lambda v: ["eager"])
    return backend


def test_without_kernels_of_ours_the_reasons_are_told(monkeypatch, tmp_path):
    monkeypatch.setattr(raw, "backends", lambda v: [])
    monkeypatch.setattr(single, "backends", lambda v: [])
    result = invoke(tmp_path, "--only", "single")
    assert result.exit_code == 0, result.output
    assert "No backend with kernels of ours runs here" in result.output
    assert "No kernels of ours were measured" in result.output
    assert {r.contender for r in summary.read(tmp_path)} == {TORCH, COPY}


def test_a_wrong_kernel_fails_its_cases_and_no_other(monkeypatch, eager_is_ours, tmp_path):
    right = type(eager_is_ours).backward

    def wrong(self, problems, *rest):
        grad_v, grad_g = right(self, problems, *rest)
        return [1.01 * t if problems[0].dim == 1 else t for t in grad_v], grad_g

    monkeypatch.setattr(type(eager_is_ours), "backward", wrong)
    result = invoke(tmp_path, "--only", "copy", "--only", "single")
    assert result.exit_code == 1
    assert "FAILED: float32 16x24x3 dim 1: VerificationError: wnkernel eager" in result.output
    assert "2 of 10 cases failed" in result.output
    shapes = {r.shape for r in summary.read(tmp_path) if r.case == "single"}
    assert shapes == {"96x8x16", "64x256", "32x33"}


def test_the_raw_calls_of_every_backend_give_the_same(eager_is_ours):
    t = raw.inputs(TINY.weights[2], torch.float32, CPU, 0)
    torchs = raw.of_torch(t, 1)
    for name in [n for n in BACKENDS if not BACKENDS[n].reasons(t.v)]:
        mine = raw._of_backend(name)(t, 1)
        torch.testing.assert_close(mine.forward()[0], torchs.forward()[0])
        torch.testing.assert_close(list(mine.backward()), list(torchs.backward()))


def test_cases_after_the_deadline_are_left_out_and_counted(tmp_path):
    out = io.StringIO()
    jobs = [Job("one", lambda: []), Job("two", lambda: [])]
    rows, failures = benchmark.run_jobs(jobs, 0.0, CPU, tmp_path, Console(file=out))
    assert (rows, failures) == ([], [])
    assert "Left out 2 of 2 cases, from 'one' on" in out.getvalue()


def fake_flag_gems(monkeypatch, **members):
    package = types.ModuleType(flaggems.PACKAGE)
    package.__spec__ = importlib.machinery.ModuleSpec(flaggems.PACKAGE, None)
    for name, member in members.items():
        setattr(package, name, member)
    monkeypatch.setitem(sys.modules, flaggems.PACKAGE, package)


def test_flaggems_is_measured_beside_ours(monkeypatch, tmp_path):
    fake_flag_gems(
        monkeypatch,
        weight_norm_interface=torch._weight_norm_interface,
        weight_norm_interface_backward=torch.ops.aten._weight_norm_interface_backward,
    )
    monkeypatch.setattr(flaggems, "SHAPES", (((64, 256), 0),))
    result = invoke(tmp_path, "--only", "flaggems")
    assert result.exit_code == 0, result.output
    assert flaggems.NAME in {r.contender for r in summary.read(tmp_path)}
    assert f"times {flaggems.NAME}, 64x256 dim 0" in " ".join(result.output.split())


def test_another_flaggems_is_left_out_with_a_plain_line(monkeypatch, tmp_path):
    fake_flag_gems(monkeypatch)
    result = invoke(tmp_path, "--only", "flaggems")
    assert result.exit_code == 0
    assert "FlagGems left out: AttributeError" in result.output
    assert "Traceback" not in result.output


def test_a_flaggems_that_fails_does_not_take_ours_with_it(monkeypatch, tmp_path):
    def broken(*args):
        raise RuntimeError("no such kernel\nin some file")

    fake_flag_gems(monkeypatch, weight_norm_interface=broken, weight_norm_interface_backward=broken)
    monkeypatch.setattr(flaggems, "SHAPES", (((64, 256), 0),))
    result = invoke(tmp_path, "--only", "flaggems")
    assert result.exit_code == 0, result.output
    assert "FlagGems left out, float32 64x256 dim 0: no such kernel" in result.output
    assert TORCH in {r.contender for r in summary.read(tmp_path)}


def test_what_the_sanitizer_watches_is_checked(monkeypatch, eager_is_ours, capsys):
    monkeypatch.setattr(sanitized, "DEVICE", "cpu")
    monkeypatch.setattr(sanitized, "backends", lambda v: ["eager"])
    monkeypatch.setattr(sanitized, "SHAPES", (((6, 5, 3), (0, 1, 2, None)),))
    monkeypatch.setattr(sanitized, "DTYPES", (torch.float32,))
    sanitized.main()
    assert capsys.readouterr().out == "8 weight norms on eager are right\n"
    right = type(eager_is_ours).forward
    monkeypatch.setattr(
        type(eager_is_ours),
        "forward",
        lambda self, p: ([1.01 * w for w in right(self, p)[0]], right(self, p)[1]),
    )
    with pytest.raises(VerificationError):
        sanitized.main()


def row(where, contender, ms, *, shape="768x48x128", dim="2", phase=FORWARD, case="single", **more):
    numel = math.prod(map(int, shape.split("x")))
    kind = {"none": "whole", "0": "first"}.get(dim, "last")
    facts = {"label": "", "dtype": "float32", "kind": kind, "numel": numel, **more}
    about = results.Subject(
        case=case, phase=phase, shape=shape, dim=dim, array_bytes=4 * numel, **facts
    )
    stats = {contender: Stats(ms, ms, ms, 3, 0.0)}
    (made,) = results.rows(about, where, stats, arrays=2 if phase == FORWARD else 3)
    return made


@pytest.fixture
def where():
    return benchmark.environment("cpu", None)


def beside_torch(rows: list[Result]) -> list[Result]:
    """With the ratios that a common measurement would have given."""
    torchs = {(r.case, r.shape, r.dim, r.phase, r.label): r for r in rows if r.contender == TORCH}
    return [
        dataclasses.replace(
            r,
            ratio_to_torch=torchs[key].median_ms / r.median_ms
            if (key := (r.case, r.shape, r.dim, r.phase, r.label)) in torchs
            else math.nan,
        )
        for r in rows
    ]


def test_the_summary_holds_figures_against_aims(where, tmp_path):
    ours = raw.ours("triton")
    large = {"shape": "8192x4096", "dim": "0"}  # 134 MB: 2 arrays in 0.1 ms are 2.68 TB/s
    rows = [
        row(where, COPY, 1.0, case="copy", shape="268435456", phase="copy"),
        row(where, "launch", 0.002, case="copy", shape="1", phase="launch"),
        *(row(where, TORCH, ms, phase=p) for p, ms in ((FORWARD, 0.3), (BACKWARD, 0.6))),
        *(row(where, ours, ms, phase=p) for p, ms in ((FORWARD, 0.03), (BACKWARD, 0.06))),
        *(row(where, TORCH, ms, phase=p, **large) for p, ms in ((FORWARD, 0.2), (BACKWARD, 0.2))),
        *(row(where, ours, ms, phase=p, **large) for p, ms in ((FORWARD, 0.125), (BACKWARD, 0.25))),
    ]
    whole = {"case": "whole", "label": "DAC", "shape": "1024x1024"}
    for phase, times in (("wall time", (9.0, 3.0, 1.0)), (aims.whole.STREAM, (0.1, 0.06, 0.05))):
        for who, ms in zip((TORCH, OURS, FUSED), times, strict=True):
            rows.append(row(where, who, ms, phase=phase, **whole))
    results.write_csv(beside_torch(rows), tmp_path)
    found = summary.read(tmp_path)

    speed = aims.copy_speed(found)
    assert speed == pytest.approx(2 * 2**30 / 1e6, rel=1e-5)  # 1 GiB there and back in 1 ms
    lines = {line.title: line for line in aims.weight_lines(found, ours)}
    share = lines["share of copy bandwidth, 64 MB and more, forward, float32"]
    assert share.met  # 2.147 TB/s of 2.147
    assert share.figure.startswith("1.00")
    assert not lines["share of copy bandwidth, 64 MB and more, backward, float32"].met  # 0.75
    key = lines["times torch, 768x48x128 dim 2, float32"]
    assert (key.met, key.figure) == (True, "10.0 (forward 10.0, backward 10.0)")
    assert lines["times torch, 1 MB and more, float32, forward"].met
    assert not lines["times torch, 1 MB and more, float32, backward"].met  # one below 0.95

    device, wall = aims.model_lines(found)
    floor = 3 * 4 * 2**20 / speed / 1e6 + 4 * 0.002  # the rows above count three arrays
    assert device.figure.startswith(f"{0.05 / floor:.2f} ")
    assert not device.met
    assert wall.met  # 9 times torch, which waits for the host: 9 ms against 0.1
    assert "bound by the host" in wall.title
    assert wall.figure.startswith("9.00")

    out = io.StringIO()
    summary.print_summary(Console(file=out, width=summary.WIDTH), found)
    for text in (
        "met",
        "missed",
        "copies its table",
        "Where we lose to torch: 1 measurements",
        "8192x4096",
    ):
        assert text in out.getvalue()


def test_rows_come_back_from_their_file(where, tmp_path):
    one = row(where, TORCH, 0.25)
    (path,) = results.write_csv([one], tmp_path)
    text = path.read_text()
    (back,) = results.read_csv(path)
    assert (back.contender, back.numel, back.median_ms) == (TORCH, one.numel, 0.25)
    assert math.isnan(back.compile_s)
    results.write_csv([back], tmp_path)
    assert path.read_text() == text
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="not a table of results"):
        results.read_csv(path)
