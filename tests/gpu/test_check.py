"""``make gpu-check`` as far as a machine without a GPU can tell: its steps, limits and statuses."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import re
import signal
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer", reason="the command line of gpu-check needs typer")
pytest.importorskip("rich", reason="the tables of gpu-check need rich")

from typer.testing import CliRunner

from tools.gpu_check import __main__ as gpu_check
from tools.gpu_check import check, steps
from tools.gpu_check import visit as visit_steps
from tools.gpu_check.steps import MOST_LINES, Log, Step, run_steps
from tools.gpu_check.versions import FACTS

from ..on_the_cpu import on_the_cpu
from ..processes import PATIENCE_S

__all__ = ["on_the_cpu"]


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def short_limits(monkeypatch):
    """Steps may take less than a useful time."""
    monkeypatch.setattr(steps, "LEAST_S", 0.0)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def clock_from(path: Path):
    """Time begins when a file is there: what comes before, a busy machine may take any time for."""

    def clock() -> float:
        if not hasattr(clock, "start") and path.exists():
            clock.start = time.monotonic()
        return time.monotonic() - clock.start if hasattr(clock, "start") else 0.0

    return clock


def run(
    tmp_path: Path, *chosen: Step, limit_s: float = PATIENCE_S, clock=time.monotonic
) -> tuple[list[steps.Outcome], str]:
    """The outcomes, and what was said."""
    said: list[str] = []
    log = Log(tmp_path / "log.gz", said.append)
    outcomes = run_steps(chosen, tmp_path, log, clock() + limit_s, said.append, clock=clock)
    log.close()
    return outcomes, "\n".join(said)


def logged(tmp_path: Path) -> str:
    """What is on the disk, also while it is being written."""
    data = (tmp_path / "log.gz").read_bytes()
    return zlib.decompressobj(wbits=31).decompress(data).decode()


def invoke(*arguments: str):
    return CliRunner().invoke(check.app, arguments)


@pytest.fixture
def visit(monkeypatch, tmp_path):
    """Runs the command line with other steps, on a GPU that is not there."""
    monkeypatch.setattr(check, "no_gpu", lambda: "")
    told = FACTS + json.dumps({"device": "a card", "commit": "abc"})
    first = Step("versions", python(f"print({told!r})"), PATIENCE_S)
    monkeypatch.setattr(visit_steps, "versions", lambda: first)

    def visit(*known: Step, arguments: tuple[str, ...] = ()):
        monkeypatch.setattr(visit_steps, "steps", lambda out, facts, device="cuda": list(known))
        patient = ("--limit-s", str(10 * PATIENCE_S))
        return invoke("--out", str(tmp_path), *patient, *arguments)

    return visit


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


def test_the_flow_goes_on_after_steps_that_fail(visit, tmp_path):
    stale = tmp_path / "results.csv"
    stale.write_text("of an earlier run")
    result = visit(
        Step("first", python("print('one'); print('first is done')"), PATIENCE_S),
        Step("broken", python("print('about to fail'); raise SystemExit(7)"), PATIENCE_S),
        Step("absent", ["no-such-tool"], PATIENCE_S, absent="no-such-tool was not found"),
        Step("not there", ["no-such-tool"], PATIENCE_S),
        Step("crash", python("import os; os.abort()"), PATIENCE_S),
        Step("last", python("print('last is done')"), PATIENCE_S),
    )
    assert result.exit_code == 1
    for text in ("first is done", "no-such-tool was not found", "killed by signal", "last is done"):
        assert text in result.output
    assert "At least one step failed" in result.output
    assert not stale.exists()
    log = gzip.decompress((tmp_path / check.LOG).read_bytes()).decode()
    assert re.search(r"^\[ *\d+\.\d first\] one\n\[ *\d+\.\d first\] first is done$", log, re.M)
    assert "about to fail" in log
    summary = (tmp_path / check.SUMMARY).read_text()
    assert summary.startswith("a card, commit abc\n")
    assert "about to fail" in summary
    assert "last is done" in summary


def test_when_all_is_well_the_status_is_zero(visit):
    fails = Step("fails", python("raise SystemExit(1)"), PATIENCE_S)
    passes = Step("passes", python("print('fine')"), PATIENCE_S)
    result = visit(passes, fails, arguments=("--skip", "fails"))
    assert result.exit_code == 0, result.output
    assert "All is well" in result.output
    assert "fails: left out after 0 s. to be skipped" in result.output


def test_what_is_skipped_leaves_the_others_where_they_are(visit):
    """Nothing comes to run beside what is timed."""
    timed, head = (Step(name, python("pass"), PATIENCE_S) for name in ("timed", "head"))
    beside = Step("beside", python("pass"), PATIENCE_S, beside=True)
    result = visit(timed, head, beside, arguments=("--skip", "head"))
    told = [line.split(":")[0] for line in result.output.splitlines() if "after 0 s" in line]
    assert result.output.index("timed: passed") < result.output.index("beside: at most")
    assert told.count("head") == 1


def test_figures_that_cannot_be_summed_up_end_no_visit(visit, monkeypatch, tmp_path):
    def broken(console, results):
        raise ZeroDivisionError("a launch that took no time")

    monkeypatch.setattr(check, "print_summary", broken)
    result = visit(Step("one", python("print('one is done')"), PATIENCE_S))
    assert result.exit_code == 0, result.output
    assert "a launch that took no time" in (tmp_path / check.SUMMARY).read_text()
    assert "one is done" in (tmp_path / check.SUMMARY).read_text()


def test_an_unknown_step_to_skip_is_refused(visit):
    result = visit(arguments=("--skip", "nonsense"))
    assert result.exit_code == 2
    assert "nonsense" in result.output


def test_nothing_comes_after_a_build_that_fails(visit):
    """There is something to mend, and another visit to save the time for."""
    says = "print('error: expected a )'); raise SystemExit(1)"
    build = Step("build", python(says), PATIENCE_S, decides=True)
    beside = Step("beside", python(f"import time; time.sleep({PATIENCE_S})"), PATIENCE_S)
    beside = replace(beside, beside=True)
    result = visit(build, beside, Step("after", python("print('never')"), PATIENCE_S))
    assert result.exit_code == 1
    assert "error: expected a )" in result.output
    assert "beside: cut short" in result.output
    assert "after: left out after 0 s. nothing is run after this: build FAILED" in result.output


def test_steps_beside_each_other_run_at_the_same_time(tmp_path):
    """Each waits for the other."""
    code = """if True:
        import pathlib, sys, time
        mine, other = map(pathlib.Path, sys.argv[1:])
        mine.touch()
        while not other.exists(): time.sleep(0.01)
    """
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    first = Step("first", [*python(code), a, b], PATIENCE_S)
    second = Step("second", [*python(code), b, a], PATIENCE_S, beside=True)
    outcomes, _ = run(tmp_path, first, second)
    assert [(o.name, o.status) for o in outcomes] == [("first", "passed"), ("second", "passed")]


@pytest.mark.usefixtures("short_limits")
def test_a_step_that_takes_too_long_is_ended_with_its_children(tmp_path):
    code = f"""if True:
        import pathlib, signal, subprocess, sys, time
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sleep = "import time; time.sleep({10 * PATIENCE_S})"
        print("child", subprocess.Popen([sys.executable, "-c", sleep]).pid, flush=True)
        pathlib.Path("begun").touch()
        exec(sleep)
    """
    slow = Step("slow", python(code), 2.0, grace_s=0.5)
    after = Step("after", python("print('ok')"), PATIENCE_S)
    outcomes, said = run(
        tmp_path, slow, after, limit_s=2 * PATIENCE_S, clock=clock_from(tmp_path / "begun")
    )
    assert [o.status for o in outcomes] == [steps.TIMED_OUT, steps.PASSED]
    assert "TIMED OUT" in said
    pid = int(re.search(r"child (\d+)$", logged(tmp_path), re.MULTILINE)[1])
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


@pytest.mark.usefixtures("short_limits", "in_the_background")
def test_a_step_that_was_asked_to_end_can_say_what_it_has(tmp_path):
    code = f"""if True:
        import pathlib, time
        try:
            pathlib.Path("begun").touch()
            time.sleep({10 * PATIENCE_S})
        except KeyboardInterrupt:
            print("three failed so far", flush=True)
    """
    slow = Step("slow", python(code), 100.0, grace_s=10.0)
    (outcome,), _ = run(tmp_path, slow, clock=lambda: 91.0 * (tmp_path / "begun").exists())
    assert outcome.status == steps.TIMED_OUT
    assert outcome.detail == "three failed so far"


@pytest.mark.usefixtures("short_limits")
def test_what_a_step_wrote_is_on_the_disk_while_it_hangs(tmp_path):
    code = f"""if True:
        import pathlib, time
        print("the one line", flush=True)
        pathlib.Path("begun").touch()
        time.sleep({10 * PATIENCE_S})
    """
    begun = time.monotonic()
    ended: list[bool] = []

    def clock() -> float:
        """Stands until the line is there, or everybody's patience is over, and ends the step."""
        there = (tmp_path / "begun").exists() and "the one line" in logged(tmp_path)
        if there or time.monotonic() - begun > PATIENCE_S:
            ended.append(there)
        return PATIENCE_S if ended else 0.0

    (outcome,), _ = run(tmp_path, Step("slow", python(code), 60.0, 1.0), clock=clock)
    assert outcome.status == steps.TIMED_OUT
    assert ended[0]


def test_a_flood_of_lines_does_not_fill_the_disk(tmp_path):
    many = python(f"for k in range({2 * MOST_LINES}): print('the same line')")
    (outcome,), _ = run(tmp_path, Step("flood", many, PATIENCE_S))
    assert outcome.status == steps.PASSED
    assert MOST_LINES <= logged(tmp_path).count("\n") < MOST_LINES + 10
    assert "is left out" in logged(tmp_path)


def test_a_full_disk_ends_no_visit(visit, tmp_path):
    """The screen has everything that matters."""
    for name in (check.LOG, check.SUMMARY):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to("/dev/full")
    unlink = Path.unlink
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Path, "unlink", lambda self, missing_ok: self.is_symlink() or unlink(self, missing_ok)
        )
        result = visit(Step("one", python("print('one is done')"), PATIENCE_S))
    assert result.exit_code == 0, result.output
    assert "one is done" in result.output
    for name in (check.LOG, check.SUMMARY):
        assert f"{tmp_path / name} cannot be written: No space left on device" in result.output


def test_an_interrupt_ends_what_runs_and_leaves_the_summary(visit, tmp_path):
    code = f"""if True:
        import os, signal, time
        print("child", os.getpid(), flush=True)
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep({10 * PATIENCE_S})
    """
    done = Step("done", python("print('done before')"), PATIENCE_S)
    result = visit(done, Step("slow", python(code), PATIENCE_S))
    assert result.exit_code != 0
    assert "done before" in (tmp_path / check.SUMMARY).read_text()
    assert not _runs(int(re.search(r"child (\d+)", result.output)[1]))


@pytest.mark.usefixtures("short_limits")
def test_a_command_is_told_when_to_begin_nothing_more(tmp_path):
    told = [sys.executable, "-c", "import sys; print(sys.argv[1])", steps.OWN_LIMIT]
    (outcome,), _ = run(tmp_path, Step("told", told, 100.0, grace_s=10.0))
    assert outcome.detail == "80"  # a case more, and its grace


def test_no_time_is_a_failure_unless_the_step_is_an_extra(tmp_path):
    needed = Step("needed", python("print(1)"), 60.0)
    extra = Step("extra", python("print(1)"), 60.0, needed=False)
    outcomes, _ = run(tmp_path, needed, limit_s=1.0)
    assert steps.failed(outcomes)
    outcomes, _ = run(tmp_path, extra, limit_s=1.0)
    assert [o.status for o in outcomes] == [steps.CUT]
    assert not steps.failed(outcomes)
