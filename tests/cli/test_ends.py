"""How the command line ends: wrong options, bugs, and standard streams that cannot be written."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from wnkernel import cli

from ..command_line import fails, invoke, on_the_cpu, save, trained
from ..processes import PATIENCE_S, ROOT, python
from ..signals import heard, receive

pytest.importorskip("typer", reason="the command line needs typer")

from wnkernel.cli.errors import BUG, Interrupted
from wnkernel.cli.signals import ENDING, Signals

__all__ = ["heard", "on_the_cpu"]

posix_only = pytest.mark.skipif(os.name != "posix", reason="pipes and devices of POSIX")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["convert"],
        ["convert", "a.pt", "b.pt"],
        ["convert", "a.pt", "b.pt", "--to", "nonsense"],
        ["info", "more"],
        ["convert", "a.pt", "b.pt", "--to", "folded", "--eps", "abc"],
        ["convert", "a.pt", "b.pt", "--to", "folded", "--eps", "nan"],
        ["convert", "a.pt", "b.pt", "--to", "folded", "--eps", "-1"],
        ["bench", "--threads", "0"],
    ],
)
def test_wrong_options_are_wrong_usage_in_one_line_and_in_json_too(arguments):
    line = fails(2, *arguments)
    said = invoke(*arguments, "--json")
    assert said.exit_code == 2
    content = json.loads(said.stdout)
    assert content["exit_code"] == 2
    if arguments[-1] != "nonsense":  # --json is no option of what is no command
        assert line == f"wnkernel: {content['error']}"


def test_without_a_command_the_help_is_shown():
    said = invoke()
    assert (said.exit_code, said.stderr) == (2, "")
    assert said.stdout == invoke("--help").stdout


def test_a_bug_has_an_exit_code_of_its_own_and_a_traceback(monkeypatch):
    def broken():
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("wnkernel.cli.app.facts", broken)
    monkeypatch.setattr(sys, "argv", ["wnkernel", "info", "--json"])
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == BUG == json.loads(out.getvalue())["exit_code"]
    assert "Traceback" in err.getvalue()
    assert "ZeroDivisionError: a bug" in err.getvalue()


@posix_only
@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("by", ["this thread", "another thread"])
def test_ctrl_c_outside_of_all_writing_is_one_line_that_says_nothing_of_files(monkeypatch, by):
    def pressed():
        receive(signal.SIGINT, by)
        raise AssertionError("went on")

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("wnkernel.cli.app.facts", pressed)
    assert fails(130, "info") == "wnkernel: ended by SIGINT"
    assert signal.getsignal(signal.SIGINT) is before


@posix_only
@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("when", ["begins", "ends"])
def test_a_signal_while_handlers_are_set_is_heard_and_leaves_none_of_ours(monkeypatch, when, after):
    """``wnkernel.cli.main`` may be called by a program that has handlers of its own."""
    before = {number: signal.getsignal(number) for number in ENDING}
    set_handler, calls, done = signal.signal, [], []

    def interrupted(number, handler):
        calls.append(number)
        previous = set_handler(number, handler)
        if len(calls) == after + (len(ENDING) if when == "ends" else 0):
            monkeypatch.undo()
            receive(ENDING[0 if when == "begins" else -1])
        return previous

    def block():
        with Signals("; a note"):
            done.append(True)

    monkeypatch.setattr(signal, "signal", interrupted)
    with pytest.raises(Interrupted, match=r"; a note$"):
        block()
    assert done == ([] if when == "begins" else [True])
    assert {number: signal.getsignal(number) for number in ENDING} == before


@posix_only
@pytest.mark.usefixtures("heard")
def test_handlers_that_are_not_pythons_stay(monkeypatch):
    """Of a program in C that has Python in it: Python cannot set them again."""
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", None)
    with Signals():
        pass


def invoke_on(stream, redirect, *arguments):
    """``wnkernel *arguments`` with ``stream`` as a standard stream; the exit code, and what the
    other one got."""
    other, redirect_other = io.StringIO(), redirect_stderr
    if redirect is redirect_stderr:
        redirect_other = redirect_stdout
    with stream, redirect(stream), redirect_other(other), pytest.raises(SystemExit) as exit_:
        cli.main([str(a) for a in arguments])
    return exit_.value.code, other.getvalue()  # and closing the stream has raised nothing


def closed_pipe():
    """As of ``wnkernel ... | true``."""
    read, write = os.pipe()
    os.close(read)
    return open(write, "w")


FAILING = [
    ["convert", "IN", "OUT", "--to", "folded"],
    ["convert", "IN", "OUT", "--to", "folded", "--json"],
    ["convert", "IN", "--to", "folded", "--dry-run"],
    ["info"],
    ["--version"],
    ["convert", "--help"],
]


def named(arguments, folder):
    """With IN and OUT in a folder, of which IN is there."""
    save(trained("legacy").state_dict(), folder / "in.pt")
    paths = {"IN": folder / "in.pt", "OUT": folder / "out.pt"}
    return [paths.get(a, a) for a in arguments]


@posix_only
@pytest.mark.parametrize("arguments", FAILING)
def test_nobody_reads_what_is_printed(tmp_path, arguments):
    ended = invoke_on(closed_pipe(), redirect_stdout, *named(arguments, tmp_path))
    assert ended == (128 + signal.SIGPIPE, "")
    assert (tmp_path / "out.pt").exists() == ("OUT" in arguments)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("arguments", FAILING)
def test_standard_output_is_a_full_disk(tmp_path, arguments):
    with Path("/dev/full").open("w") as full:
        code, said = invoke_on(full, redirect_stdout, *named(arguments, tmp_path))
    assert (code, said) == (4, "wnkernel: /dev/full: No space left on device\n")
    assert (tmp_path / "out.pt").exists() == ("OUT" in arguments)


def test_standard_streams_that_are_closed(tmp_path):
    for redirect in (redirect_stdout, redirect_stderr):
        arguments = named(FAILING[0], tmp_path)
        with redirect(None), pytest.raises(SystemExit) as exit_:
            cli.main([*map(str, arguments), "--force"])
        assert exit_.value.code == 0
    assert (tmp_path / "out.pt").exists()


@posix_only
def test_nobody_reads_the_errors(tmp_path):
    arguments = ("convert", tmp_path / "no.pt", tmp_path / "out.pt", "--to", "folded")
    ended = invoke_on(closed_pipe(), redirect_stderr, *arguments)
    assert ended == (128 + signal.SIGPIPE, "")


@posix_only
@pytest.mark.parametrize("terminal", ["xterm", "dumb"])
@pytest.mark.parametrize("options", [[], ["--quiet"], ["--json"]])
def test_a_bar_is_shown_on_a_terminal_only_and_only_if_there_is_something_to_say(
    tmp_path, monkeypatch, options, terminal
):
    import pty

    monkeypatch.setenv("TERM", terminal)
    shown = terminal == "xterm" and not options
    torch.save({"weight_g": torch.ones(3, 1), "weight_v": torch.ones(3, 2)}, tmp_path / "in.pt")
    arguments = ("convert", tmp_path / "in.pt", tmp_path / "out.pt", "--to", "folded", *options)
    ours, theirs = pty.openpty()
    with open(ours, "rb", buffering=0) as seen, open(theirs, "w") as errors:
        errors.write("begin")  # so that there is something to read
        errors.flush()
        code, _ = invoke_on(errors, redirect_stderr, *arguments)
        said = seen.read(1 << 16)
        assert (code, b"writing" in said, said != b"begin") == (0, shown, shown)
    again = invoke(*arguments, "--force")  # on no terminal
    assert (again.exit_code, again.stderr) == (0, "")


PRESSED = """
import signal
signal.raise_signal(signal.SIGINT)
for _ in range(1000):  # Python calls the handler between two instructions
    pass
raise SystemExit("not heard")
"""
"""What is imported as torch."""

SCRIPT = """
import sys
sys.argv = ["/some/bin/wnkernel", *sys.argv[1:]]
from wnkernel.cli import main
main()
"""
"""The script that pip installs."""

PROGRAMS = {
    "python -m wnkernel": [sys.executable, "-m", "wnkernel"],
    "python -mwnkernel": [sys.executable, "-mwnkernel"],
    "wnkernel": [sys.executable, "-c", SCRIPT],
}


@posix_only
@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("options", [[], ["info"], ["convert", "no.pt", "--to", "folded"]], ids=str)
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_ctrl_c_while_torch_is_imported_is_one_line(tmp_path, program, options):
    (tmp_path / "torch.py").write_text(PRESSED)
    ended = subprocess.run(
        [*program, *options],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert (ended.returncode, ended.stdout) == (130, "")
    assert ended.stderr == "wnkernel: ended by SIGINT\n"


@posix_only
@pytest.mark.usefixtures("heard")
def test_other_programs_that_import_the_package_end_as_they_are_used_to(tmp_path):
    (tmp_path / "torch.py").write_text(PRESSED)
    code = "try:\n import wnkernel\nexcept KeyboardInterrupt:\n print('theirs')"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert (ended.returncode, ended.stdout) == (0, "theirs\n"), ended.stderr


def test_shells_complete_commands_and_options():
    ended = python(
        "-m",
        "wnkernel",
        "convert",
        _WNKERNEL_COMPLETE="complete_bash",
        COMP_WORDS="wnkernel convert --dr",
        COMP_CWORD="2",
    )
    assert (ended.returncode, ended.stdout.strip()) == (0, "--dry-run"), ended.stderr
    assert "--install-completion" in invoke("--help").stdout
