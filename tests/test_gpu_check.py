"""``make gpu-check`` as far as a machine without a GPU can tell: its steps, limits and statuses."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer", reason="the command line of gpu-check needs typer")
pytest.importorskip("rich", reason="the tables of gpu-check need rich")

from typer.testing import CliRunner

from benchmarks import gpu_check
from benchmarks.gpu import __main__ as benchmark
from benchmarks.gpu import check, checks, steps
from benchmarks.gpu.steps import Step, run_steps

from .processes import PATIENCE_S


@pytest.fixture(autouse=True)
def _on_the_cpu():
    with torch.device("cpu"):  # whatever device the other tests run on
        yield


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def short_limits(monkeypatch):
    """Steps may take less than a useful time."""
    monkeypatch.setattr(steps, "LEAST_S", 0.0)
    monkeypatch.setattr(steps, "GRACE_S", 1.0)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.fixture
def time_begins_with_a_word(monkeypatch, tmp_path):
    """The time of a step is counted from its first word on: what it does before, a busy machine may
    take any time for."""

    class Process(subprocess.Popen):
        def wait(self, timeout=None):
            deadline = time.monotonic() + PATIENCE_S
            while not self.said() and self.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            return super().wait(timeout)

        def said(self):
            """What the log has after the line with the command."""
            return (tmp_path / "log").read_text().rpartition(" ".join(self.args))[2].strip()

    monkeypatch.setattr(subprocess, "Popen", Process)


def run(
    tmp_path: Path, *chosen: Step, limit_s: float = PATIENCE_S
) -> tuple[list[steps.Outcome], str]:
    """The outcomes, and what was said."""
    said: list[str] = []
    outcomes = run_steps(chosen, tmp_path, tmp_path / "log", limit_s, said.append)
    return outcomes, "\n".join(said)


def invoke(*arguments: str):
    return CliRunner().invoke(check.app, arguments)


def test_without_a_gpu_one_line_says_so(no_gpu, tmp_path):
    result = invoke("--out", str(tmp_path / "out"))
    assert result.exit_code == check.NO_GPU
    assert result.exit_code not in (0, 1, 2)
    (line,) = result.output.strip().splitlines()
    assert "there is no GPU here" in line
    assert torch.__version__ in line
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named(monkeypatch, capsys):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "typer" else there(name)
    )
    with pytest.raises(SystemExit) as exit_:
        gpu_check.main()
    assert exit_.value.code == gpu_check.MISSING_PACKAGE
    assert capsys.readouterr().err == "gpu-check: not installed, and needed: typer\n"


def test_the_flow_goes_on_after_steps_that_fail(monkeypatch, short_limits, tmp_path):
    known = [
        Step("first", python("print('one'); print('first is done')"), PATIENCE_S),
        Step("broken", python("print('about to fail'); raise SystemExit(7)"), PATIENCE_S),
        Step("absent", ["no-such-tool"], PATIENCE_S, absent="no-such-tool was not found"),
        Step("not there", ["no-such-tool"], PATIENCE_S),
        Step("crash", python("import os; os.abort()"), PATIENCE_S),
        Step("last", python("print('last is done')"), PATIENCE_S),
    ]
    monkeypatch.setattr(check, "no_gpu", lambda: "")
    monkeypatch.setattr(check, "steps", lambda out: known)
    stale = tmp_path / "single.csv"
    stale.write_text("of an earlier run")
    result = invoke("--out", str(tmp_path))
    assert result.exit_code == 1
    for text in ("first is done", "no-such-tool was not found", "killed by signal", "last is done"):
        assert text in result.output
    assert "At least one step failed" in result.output
    assert not stale.exists()
    log = (tmp_path / check.LOG).read_text()
    assert "one\nfirst is done" in log
    assert "about to fail" in log
    assert "At least one step failed" in log  # the tables at the end are in the log, too


def test_when_all_is_well_the_status_is_zero(monkeypatch, tmp_path):
    fails = Step("fails", python("raise SystemExit(1)"), PATIENCE_S)
    known = [Step("passes", python("print('fine')"), PATIENCE_S), fails]
    monkeypatch.setattr(check, "no_gpu", lambda: "")
    monkeypatch.setattr(check, "steps", lambda out: known)
    result = invoke("--out", str(tmp_path), "--skip", "fails")
    assert result.exit_code == 0, result.output
    assert "All is well" in result.output


def test_an_unknown_step_to_skip_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(check, "no_gpu", lambda: "")
    result = invoke("--out", str(tmp_path), "--skip", "nonsense")
    assert result.exit_code == 2
    assert "nonsense" in result.output


@pytest.mark.usefixtures("short_limits", "time_begins_with_a_word")
def test_a_step_that_takes_too_long_is_ended_with_its_children(tmp_path):
    code = f"""if True:
        import subprocess, sys, time
        sleep = "import time; time.sleep({10 * PATIENCE_S})"
        print("child", subprocess.Popen([sys.executable, "-c", sleep]).pid, flush=True)
        exec(sleep)
    """
    slow, after = Step("slow", python(code), 0.5), Step("after", python("print('ok')"), PATIENCE_S)
    outcomes, said = run(tmp_path, slow, after, limit_s=2 * PATIENCE_S)
    assert [o.status for o in outcomes] == [steps.TIMED_OUT, steps.PASSED]
    assert "TIMED OUT" in said
    pid = int(re.search(r"^child (\d+)$", (tmp_path / "log").read_text(), re.MULTILINE)[1])
    deadline = time.monotonic() + PATIENCE_S
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (OSError, IndexError):
        return False
    return state != "Z"


@pytest.fixture
def in_the_background():
    """As a shell runs things that nobody can interrupt from the keyboard."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("short_limits", "time_begins_with_a_word", "in_the_background")
def test_a_step_that_was_asked_to_end_can_say_what_it_has(monkeypatch, tmp_path):
    monkeypatch.setattr(steps, "GRACE_S", PATIENCE_S)
    code = f"""if True:
        import time
        try:
            print("begun", flush=True)
            time.sleep({10 * PATIENCE_S})
        except KeyboardInterrupt:
            print("three failed so far", flush=True)
    """
    (outcome,), _ = run(tmp_path, Step("slow", python(code), 0.5))
    assert outcome.status == steps.TIMED_OUT
    assert outcome.detail == "three failed so far"


@pytest.mark.usefixtures("short_limits")
def test_time_for_later_steps_is_kept(tmp_path):
    greedy = Step("greedy", python(f"import time; time.sleep({10 * PATIENCE_S})"), PATIENCE_S)
    later = [sys.executable, "-c", "import sys; print(sys.argv[1])", steps.OWN_LIMIT]
    later = Step("later", later, PATIENCE_S, reserve_s=PATIENCE_S)
    outcomes, _ = run(tmp_path, greedy, later, limit_s=PATIENCE_S + 0.5)
    assert [o.status for o in outcomes] == [steps.TIMED_OUT, steps.PASSED]
    assert outcomes[0].seconds < PATIENCE_S
    assert PATIENCE_S / 2 < float(outcomes[1].detail) <= PATIENCE_S - steps.MARGIN_S  # its own use


def test_no_time_is_a_failure_unless_the_step_is_an_extra(tmp_path):
    needed = Step("needed", python("print(1)"), 60.0)
    extra = Step("extra", python("print(1)"), 60.0, needed=False)
    outcomes, _ = run(tmp_path, needed, limit_s=1.0)
    assert steps.failed(outcomes)
    outcomes, _ = run(tmp_path, extra, limit_s=1.0)
    assert [o.status for o in outcomes] == [steps.CUT]
    assert not steps.failed(outcomes)


def test_the_reserves_fit_into_the_time(tmp_path):
    known = checks.steps(tmp_path)
    assert len({step.name for step in known}) == len(known)
    assert sum(step.reserve_s for step in known) < 300
    assert all(step.limit_s >= max(step.reserve_s, steps.LEAST_S) for step in known)


def test_the_benchmark_steps_are_commands_that_exist(tmp_path):
    """The sections of the three steps are all there are, and take the options that they get."""
    known = {step.name: step for step in checks.steps(tmp_path)}
    sections: list[str] = []
    for name in ("weights", "models", "flaggems"):
        assert known[name].command[1:3] == ["-m", "benchmarks.gpu"]
        arguments = ["1" if a == steps.OWN_LIMIT else a for a in known[name].command[3:]]
        sections += [b for a, b in pairwise(arguments) if a == "--only"]
        result = CliRunner().invoke(benchmark.app, [*arguments, "--device", "nonsense"])
        assert result.exit_code == 2
        assert "nonsense" in result.output  # it came as far as the device
    assert sorted(sections) == sorted(s.value for s in benchmark.Section)


def test_the_tests_run_in_as_many_processes_as_there_are(monkeypatch, tmp_path):
    there = importlib.util.find_spec
    gone: set[str] = set()
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in gone else there(name)
    )

    def tests() -> Step:
        return next(step for step in checks.steps(tmp_path) if step.name == "tests")

    assert "--device" in tests().command
    gone.add("xdist")
    assert "-n" not in tests().command
    gone.add("hypothesis")
    assert "--ignore=tests/test_problem.py" in tests().command
    gone.add("pytest")
    assert tests().absent == "pytest is not installed"


def test_what_needs_no_gpu_is_not_run_on_one(tmp_path):
    """And nothing that is named is gone."""
    (tests,) = (step for step in checks.steps(tmp_path) if step.name == "tests")
    ignored = {a.removeprefix("--ignore=") for a in tests.command if a.startswith("--ignore=")}
    for name in checks.NO_GPU_NEEDED:
        found = {str(path.relative_to(checks.ROOT)) for path in checks.TESTS.glob(name)}
        assert found, name
        assert found <= ignored
    takes_a_backend = re.compile(r"^def test_\w+\((backend|route|gpu_backend)\b", re.MULTILINE)
    of_every_backend = {
        str(path.relative_to(checks.ROOT))
        for path in checks.TESTS.glob("test_*.py")
        if takes_a_backend.search(path.read_text())
    }
    assert of_every_backend
    assert not of_every_backend & ignored


def test_kernels_are_compiled_before_a_sanitizer_watches_them(tmp_path):
    """Under one, compiling takes longer than there is time."""
    names = [step.name for step in checks.steps(tmp_path)]
    known = {step.name: step for step in checks.steps(tmp_path)}
    assert not known["kernels"].absent
    for name in checks.TOOLS:
        assert names.index("kernels") < names.index(name)
        assert list(known[name].command[-3:]) == list(known["kernels"].command)


def test_the_sanitizer_is_found_beside_cuda(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(checks.glob, "glob", lambda pattern: [])
    steps_by_name = {step.name: step for step in checks.steps(tmp_path)}
    assert steps_by_name["memcheck"].absent == "compute-sanitizer was not found"
    tool = tmp_path / "cuda" / "bin" / "compute-sanitizer"
    tool.parent.mkdir(parents=True)
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    for name in checks.TOOLS:
        step = next(s for s in checks.steps(tmp_path) if s.name == name)
        assert not step.absent
        assert step.command[:3] == [str(tool), "--tool", name]
        assert step.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
