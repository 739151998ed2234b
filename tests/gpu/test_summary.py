"""Figures of a GPU beside what they should be, and the files that they come from."""

from __future__ import annotations

import dataclasses
import errno
import io
import math

import pytest

pytest.importorskip("typer", reason="the command line of the benchmark needs typer")
pytest.importorskip("rich", reason="the tables of the benchmark need rich")

from rich.console import Console

from benchmarks import results
from benchmarks.contenders import COPY, FUSED, OURS, TORCH
from benchmarks.environment import environment
from benchmarks.gpu import cases, raw, summary
from benchmarks.gpu.raw import BACKWARD, FORWARD
from benchmarks.gpu.whole import STREAM
from benchmarks.report import PIPE_WIDTH
from benchmarks.results import Result
from wnkernel.cli.timing import Times

from ..on_the_cpu import on_the_cpu

__all__ = ["on_the_cpu"]


def row(where, contender, ms, *, shape="768x48x128", dim="2", phase=FORWARD, case="single", **more):
    numel = math.prod(map(int, shape.split("x")))
    kind = {"none": "whole", "0": "first"}.get(dim, "last")
    facts = {"label": "", "dtype": "float32", "kind": kind, "numel": numel, **more}
    about = results.Subject(
        case=case, phase=phase, shape=shape, dim=dim, array_bytes=4 * numel, **facts
    )
    stats = {contender: Times(ms, ms, ms, 3, 0.0)}
    (made,) = results.rows(about, where, stats, arrays=2 if phase == FORWARD else 3)
    return made


@pytest.fixture
def where():
    return environment("cpu", None)


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
    for phase, times in (("wall time", (9.0, 3.0, 1.0)), (STREAM, (0.1, 0.06, 0.05))):
        for who, ms in zip((TORCH, OURS, FUSED), times, strict=True):
            rows.append(row(where, who, ms, phase=phase, **whole))
    results.append_csv(beside_torch(rows), tmp_path / cases.RESULTS)
    found = summary.read(tmp_path)

    speed = summary.copy_speed(found)
    assert speed == pytest.approx(2 * 2**30 / 1e6, rel=1e-5)  # 1 GiB there and back in 1 ms
    lines = {line.title: line for line in summary.weight_lines(found, ours)}
    share = lines["share of copy bandwidth, 64 MB and more, forward, float32"]
    assert share.met  # 2.147 TB/s of 2.147
    assert share.figure.startswith("1.00")
    assert not lines["share of copy bandwidth, 64 MB and more, backward, float32"].met  # 0.75
    least = lines["share of copy bandwidth, 64 MB and more, backward, float32, of 3 arrays"]
    assert (least.met, least.figure) == (None, "0.75, least 0.75")
    key = lines["times torch, 768x48x128 dim 2, float32"]
    assert (key.met, key.figure) == (True, "10.0 (forward 10.0, backward 10.0)")
    assert lines["times torch, 1 MB and more, float32, forward"].met
    assert not lines["times torch, 1 MB and more, float32, backward"].met  # one below 0.95

    device, wall = summary.model_lines(found)
    floor = 3 * 4 * 2**20 / speed / 1e6 + 4 * 0.002  # the rows above count three arrays
    assert device.figure.startswith(f"{0.05 / floor:.2f} ")
    assert not device.met
    assert wall.met  # 9 times torch, which waits for the host: 9 ms against 0.1
    assert "bound by the host" in wall.title
    assert wall.aim == ">= 2"
    assert wall.figure.startswith("9.00")

    out = io.StringIO()
    summary.print_summary(Console(file=out, width=PIPE_WIDTH), found)
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


def test_a_row_that_was_not_written_to_its_end_is_not_read(where, tmp_path):
    path = tmp_path / cases.RESULTS
    results.append_csv([row(where, TORCH, 0.25)], path)
    results.append_csv([row(where, COPY, 0.5)], path)
    path.write_text(path.read_text()[:-40])
    assert [r.contender for r in summary.read(tmp_path)] == [TORCH]


def test_half_a_row_is_taken_back(where, tmp_path, monkeypatch):
    path = tmp_path / cases.RESULTS
    results.append_csv([row(where, TORCH, 0.25)], path)
    before = path.read_text()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(results.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            results.append_csv([row(where, COPY, 0.5)], path)
    assert path.read_text() == before
    results.append_csv([row(where, COPY, 0.5)], path)
    assert [r.contender for r in summary.read(tmp_path)] == [TORCH, COPY]
