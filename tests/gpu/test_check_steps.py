"""What ``make gpu-check`` runs, in which order, and whether that fits into its time."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterable
from itertools import pairwise

import pytest
import torch

pytest.importorskip("typer", reason="the command line of gpu-check needs typer")
pytest.importorskip("rich", reason="the tables of gpu-check need rich")

import typer

import setup
from benchmarks.gpu import __main__ as benchmark
from benchmarks.gpu import single
from benchmarks.gpu.cases import Section
from benchmarks.gpu.plan import REAL, Part
from benchmarks.layers import MAX_NUMEL
from benchmarks.shapes import LayerCase, grid
from tools.gpu_check import check, profiling, smoke, steps, tests_to_run, versions, visit
from tools.gpu_check.steps import Step, longest_s
from tools.gpu_check.versions import Facts, facts_of
from wnkernel.backends.triton import plan as plans
from wnkernel.problem import canonical_dim, row_view

from ..on_the_cpu import on_the_cpu
from ..triton.cases import OLDEST_TRITON

__all__ = ["on_the_cpu"]

BUDGET_S = 480.0
"""Two visits and their starts fit into a quarter of an hour."""


@pytest.fixture
def all_tools(monkeypatch):
    monkeypatch.setattr(visit, "tool", lambda name: f"/tools/{name}")


ALL_RUN = Facts()


def known(tmp_path, facts=ALL_RUN, **more) -> dict[str, Step]:
    found = visit.steps(tmp_path, facts, **more)
    by_name = {step.name: step for step in found}
    assert len(by_name) == len(found)
    return by_name


@pytest.mark.usefixtures("all_tools")
def test_the_needed_steps_fit_into_the_time(tmp_path):
    needed = [visit.versions(), *known(tmp_path).values()]
    assert longest_s(needed) + visit.SUMMARY_S <= visit.LIMIT_S <= BUDGET_S
    assert all(step.limit_s >= 2 * step.grace_s > 0 for step in needed)
    assert all(step.grace_s == 20 for step in needed if step.name.startswith("tests"))


@pytest.mark.usefixtures("all_tools")
def test_what_is_worth_most_comes_first(tmp_path):
    names = list(known(tmp_path))
    order = [
        "build", "smoke, cuda, float32", "key figures, cuda", "tests, cuda", "profile",
        "smoke, triton, float32", "key figures, triton", "more figures, cuda", "tests, triton",
        "other tests", "more figures, triton", "flaggems",
    ]  # fmt: skip
    assert [name for name in names if name in order] == order
    groups = [[step.name for step in g] for g in steps._side_by_side([*known(tmp_path).values()])]
    assert groups[0] == ["build", *(f"compile triton, {t}" for t in smoke.DTYPES)]
    assert ["tests, cuda", "memcheck", "racecheck"] in groups
    timed = ("key figures", "more figures", "profile")
    assert all(len(g) == 1 for g in groups if g[0].startswith(timed))  # nothing beside these


def test_few_files_are_written_and_all_in_one_folder(tmp_path):
    assert len(check.FILES) <= 8
    told = [a for step in known(tmp_path).values() for a in step.command if str(tmp_path) in a]
    names = {a.removeprefix(str(tmp_path.resolve())).lstrip("/") for a in told}
    assert names == {"", "tests.csv", "ncu.txt"}
    assert names - {""} <= set(check.FILES)


def test_the_benchmark_steps_are_commands_that_exist(tmp_path):
    """They take the options that they get, and leave nothing out."""
    found = [s for s in known(tmp_path).values() if s.command[1:3] == ["-m", "benchmarks.gpu"]]
    measured = set()
    for step in found:
        arguments = ["1" if a == steps.OWN_LIMIT else a for a in step.command[3:]]
        told = list(pairwise(arguments))
        (part,) = (b for a, b in told if a == "--part")
        backend = next((b for a, b in told if a == "--backend"), "")
        measured |= {(backend, part, b) for a, b in told if a == "--only"}
        typer.main.get_command(benchmark.app).make_context("benchmark", arguments)
    sections = [s.value for s in Section if s is not Section.FLAGGEMS]
    every = {(b, p.value, s) for b in ("cuda", "triton") for p in Part for s in sections}
    every -= {("triton", p.value, "copy") for p in Part}  # a card copies as fast for everyone
    assert measured == every | {("", "rest", "flaggems")}


@pytest.mark.parametrize(
    ("facts", "left_out", "runs"),
    [
        (
            Facts(no_build="nvcc 12.4 and torch's CUDA 13.0 differ"),
            {"build", "smoke, cuda, float32", "tests, cuda", "memcheck", "profile"},
            {"key figures, cuda", "key figures, triton", "tests, triton", "other tests"},
        ),
        (
            Facts(no_cuda="the driver is 525.60.13, 530 or later is needed"),
            {"build", "smoke, cuda, float32", "tests, cuda", "memcheck", "profile"},
            {"key figures, cuda", "smoke, triton, float32"},
        ),
        (
            Facts(no_triton="triton cannot build its driver: no C compiler"),
            {"compile triton, float32", "smoke, triton, float32", "key figures, triton"},
            {"build", "smoke, cuda, float32", "key figures, cuda", "tests, cuda", "memcheck"},
        ),
    ],
)
@pytest.mark.usefixtures("all_tools")
def test_what_cannot_run_is_left_out_with_its_reason_and_the_rest_runs(
    tmp_path, facts, left_out, runs
):
    found = known(tmp_path, facts)
    (why,) = filter(None, (facts.no_build, facts.no_cuda, facts.no_triton))
    assert {found[name].absent for name in left_out} == {why}
    assert {found[name].absent for name in runs} == {""}
    if facts.no_triton == "":  # copies, launches and torch are measured without kernels of ours
        assert "eager" in found["key figures, cuda"].command


def test_a_card_or_a_driver_that_is_too_old_is_told():
    assert versions.no_cuda((9, 0), "580.82.07") == ""
    assert versions.no_cuda((6, 1), "580.82.07") == (
        "the card has compute capability 6.1, 7.0 is needed"
    )
    assert "525.60.13" in versions.no_cuda((9, 0), "525.60.13")


class Card:
    """A GPU as far as torch and nvidia-smi tell."""

    def __init__(self, monkeypatch, *, free=70e9, others="", error=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda k: "NVIDIA Card")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda k: (9, 0))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda k: "132 processors")
        monkeypatch.setattr(versions, "no_triton", lambda: "")
        monkeypatch.setattr(versions, "no_build", lambda: "")

        def mem_get_info(k):
            if error:
                raise torch.OutOfMemoryError(error)
            return free, 80e9

        monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
        zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda n, device: zeros(n))
        answers = {"--query-compute-apps": others, "--query-gpu=driver": "580.82.07"}
        monkeypatch.setattr(
            versions,
            "_output",
            lambda *command: next((a for q, a in answers.items() if q in command[1]), "?"),
        )


def told(capsys) -> tuple[Facts, list[str]]:
    versions.main()
    lines = capsys.readouterr().out.splitlines()
    return facts_of(lines), [line for line in lines if line.startswith(versions.PROBLEM)]


def test_a_card_that_is_well_has_no_problems(monkeypatch, capsys):
    Card(monkeypatch)
    facts, problems = told(capsys)
    assert problems == []
    assert (facts.device, facts.no_cuda, facts.no_triton) == ("NVIDIA Card", "", "")
    assert facts.about == f"NVIDIA Card, commit {facts.commit}"


def test_a_card_in_use_and_a_full_one_are_told_and_tried(monkeypatch, capsys):
    Card(monkeypatch, free=1.2e9, others="4711, 70000 MiB")
    facts, problems = told(capsys)
    assert facts.no_cuda == ""
    assert [p for p in problems if "1.2 of 80.0 GB are free" in p]
    assert [p for p in problems if "in use (4711, 70000 MiB)" in p]


def test_a_card_without_memory_for_anything_is_one_line(monkeypatch, capsys):
    Card(monkeypatch, error="CUDA error: out of memory\nand much more")
    facts, problems = told(capsys)
    assert (
        facts.no_cuda == facts.no_triton == ("the card cannot be used: CUDA error: out of memory")
    )
    assert len(problems) == 2


def test_why_nothing_can_be_built_is_told(monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(setup, "no_cuda", lambda: "nvcc 12.4 and torch's CUDA 13.0 differ")
    assert versions.no_build() == "nvcc 12.4 and torch's CUDA 13.0 differ"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert versions.no_build() == "no C++ compiler (no-such-compiler)"
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "ninja" else there(name)
    )
    assert versions.no_build() == "not installed: ninja"


def test_facts_that_never_came_keep_nothing_from_being_tried():
    assert facts_of(["a line", "and no more"]) == Facts()


def test_the_tests_run_in_as_many_processes_as_there_are(monkeypatch, tmp_path):
    there = importlib.util.find_spec
    gone: set[str] = set()
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None
        if name in gone
        else there("os")
        if name == "pytest_timeout"
        else there(name),
    )

    def tests(name="tests, cuda") -> Step:
        return known(tmp_path)[name]

    assert {"--device", "--maxfail=60", "--tb=short", "--timeout"} <= set(tests().command)
    assert tests().command[tests().command.index("--only-backends") + 1] == "cuda,auto"
    for name in ("tests, cuda", "tests, triton", "other tests"):  # each test once
        assert ("--and-without-backend" in tests(name).command) == (name != "tests, triton")
    gone.update({"xdist", "pytest_timeout"})
    assert not {"-n", "--timeout"} & set(tests().command)
    assert "tests/core/test_problem.py" in tests("other tests").command
    gone.add("hypothesis")
    assert "tests/core/test_problem.py" not in tests("other tests").command
    gone.add("pytest")
    assert tests().absent == "pytest is not installed"


def test_every_file_with_tests_for_gpus_is_run_and_no_other():
    """And nothing that is named is gone."""
    first = tests_to_run.files(tests_to_run.FIRST)
    others = tests_to_run.files(tests_to_run.OTHERS, without=tests_to_run.FIRST)
    assert first == [tests_to_run.TESTS / name for name in tests_to_run.FIRST]
    assert not set(first) & set(others)
    assert all(list(tests_to_run.TESTS.glob(name)) for name in tests_to_run.NO_GPU_NEEDED)
    takes_a_backend = re.compile(r"^def test_\w+\((backend|route|gpu_backend)\b", re.MULTILINE)
    of_every_backend = {
        p for p in tests_to_run.TESTS.glob("*/test_*.py") if takes_a_backend.search(p.read_text())
    }
    assert of_every_backend
    assert of_every_backend <= {*first, *others}


def test_a_sanitizer_watches_what_was_tried_without_it(tmp_path):
    names = list(known(tmp_path))
    for name in visit.TOOLS:
        step = known(tmp_path)[name]
        assert names.index("smoke, cuda, float32") < names.index(name)
        tried = list(known(tmp_path)[f"smoke, cuda, {visit.WATCHED[0]}"].command)
        assert list(step.command)[-len(tried) - 2 :] == [*tried, "--dtype", visit.WATCHED[1]]
        assert step.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"


def test_the_tools_are_found_beside_cuda(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(visit.glob, "glob", lambda pattern: [])
    assert known(tmp_path)["memcheck"].absent == "compute-sanitizer was not found"
    assert known(tmp_path)["profile"].absent == "ncu was not found"
    for name in (visit.SANITIZER, visit.PROFILER):
        tool = tmp_path / "cuda" / "bin" / name
        tool.parent.mkdir(parents=True, exist_ok=True)
        tool.write_text("#!/bin/sh\n")
        tool.chmod(0o755)
    found = known(tmp_path)
    assert found["racecheck"].command[1:3] == ["--tool", "racecheck"]
    assert profiling.command(tmp_path / "report")[:3] == [
        str(tmp_path / "cuda" / "bin" / "ncu"), "--clock-control", "none"
    ]  # fmt: skip
    assert not found["racecheck"].absent
    assert not found["profile"].absent


REPORT = """==PROF== Profiling "weight_norm_kernel" - 0: 0%....50%....100% - 9 passes
  weight_norm_kernel (512, 1, 1)x(256, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
"""


@pytest.mark.parametrize("launches", [8, 7])
def test_a_profile_without_all_launches_is_a_failure(monkeypatch, tmp_path, capsys, launches):
    """Whatever the profiler's exit status says."""
    report = tmp_path / visit.REPORT
    text = launches * REPORT + "==ERROR== no permission\n"
    code = f"open({str(report)!r}, 'w').write({text!r})"
    monkeypatch.setattr(profiling, "command", lambda report: [sys.executable, "-c", code])
    assert profiling.main(report, "a card, commit abc") == (launches != 8)
    assert report.read_text().endswith("\na card, commit abc\n")
    told = capsys.readouterr().out
    assert f"{launches} of 8 launches are in the report" in told
    assert ("no permission" in told) == (launches != 8)


def variants(weights: Iterable[tuple[LayerCase, torch.dtype]]) -> set[tuple[object, ...]]:
    """What Triton compiles for weights alone: tiles, and whether there is a second launch."""
    found = set()
    for case, dtype in weights:
        v = torch.empty(case.shape, dtype=dtype, device="meta")
        view = row_view(v, canonical_dim(case.dim, v.ndim))
        size = dtype.itemsize
        p = plans.plan(view.outer, view.rows, view.inner, size, 16 // size)
        found.add((size, p.tile, p.split > 1))
    return found


def test_what_is_measured_first_was_compiled_before():
    """Compiling takes longer than a case may."""
    pytest.importorskip("triton", minversion=OLDEST_TRITON, reason="needs Triton")
    tried = {
        (LayerCase(shape, dim, "", ""), dtype)
        for shape, dims in smoke.SHAPES
        for dim in dims
        for dtype in single.DTYPES
    }
    weights = {(c, dtype) for c in REAL.weights[Part.KEY] for dtype in single.DTYPES}
    models = {(c, torch.float32) for cs in REAL.models[Part.KEY].values() for c in cs}
    small = {(c, torch.float32) for c in grid() if c.numel < MAX_NUMEL and c.dim == 0}
    assert variants(weights | models | small) <= variants(tried)
