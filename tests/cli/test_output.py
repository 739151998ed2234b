"""What ``wnkernel convert`` writes is there whole or not at all, and nothing else is touched."""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer", reason="the command line needs typer")

from wnkernel.cli import output
from wnkernel.cli.errors import BUG
from wnkernel.cli.output import Writer

from ..command_line import convert, fails, files_in, invoke, load, on_the_cpu, out, save, trained
from ..signals import heard, receive
from .test_shards import join, split

__all__ = ["heard", "on_the_cpu", "out"]

both_formats = pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
posix_only = pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")


@pytest.fixture
def source(tmp_path, request):
    """A legacy checkpoint of the format that the test is for, in a folder of its own."""
    suffix = request.node.callspec.params.get("suffix", ".pt")
    folder = tmp_path / "in"
    folder.mkdir()
    save(trained("legacy").state_dict(), folder / f"in{suffix}")
    return folder / f"in{suffix}"


@both_formats
def test_a_file_that_is_there_is_replaced_with_force_only(source, out, suffix):
    target = out / f"out{suffix}"
    target.write_text("precious")
    line = fails(4, "convert", source, target, "--to", "folded")
    assert line == f"wnkernel: {target}: exists already; --force replaces it"
    assert files_in(out) == {target.name: b"precious"}
    convert(source, target, "folded", "--force")
    assert "pre.weight" in load(target)
    assert list(files_in(out)) == [target.name]


@both_formats
@pytest.mark.parametrize("link", ["itself", "another path", "symbolic link", "hard link"])
def test_the_input_is_not_replaced_by_whatever_name(source, out, suffix, link):
    target = {
        "itself": source,
        "another path": source.parent / ".." / source.parent.name / source.name,
    }.get(link, out / f"link{suffix}")
    if link == "symbolic link":
        target.symlink_to(source)
    elif link == "hard link":
        os.link(source, target)
    before = source.read_bytes()
    for options in ([], ["--force"], ["--force", "--dry-run"]):
        line = fails(2, "convert", source, target, "--to", "folded", *options)
        assert "is the input" in line
    assert source.read_bytes() == before


@both_formats
def test_a_link_to_another_file_stays_a_link(source, out, suffix):
    (out / "store").mkdir()
    (out / "store" / "real").write_text("old")
    link = out / f"link{suffix}"
    link.symlink_to(Path("store") / "real")
    assert "exists already" in fails(4, "convert", source, link, "--to", "folded")
    convert(source, link, "folded", "--force")
    assert link.is_symlink()
    assert "pre.weight" in load(link)
    assert list(files_in(out / "store")) == ["real"]


@both_formats
def test_outputs_that_cannot_be_files(source, out, suffix):
    (out / "folder.pt").mkdir()
    for target, said in (
        (out / "missing" / f"out{suffix}", "there is no folder"),
        (out / "folder.pt", "is a folder"),
        (source / f"out{suffix}", "there is no folder"),
    ):
        assert said in fails(4, "convert", source, target, "--to", "folded", "--force")
    line = fails(2, "convert", source, out / "model.onnx", "--to", "folded")
    assert ".safetensors" in line
    assert "expected a file to write to" in fails(2, "convert", source, "--to", "folded")
    assert files_in(out) == {}


@posix_only
@both_formats
def test_a_device_is_not_replaced(source, out, suffix):
    os.mkfifo(out / f"pipe{suffix}")
    line = fails(4, "convert", source, out / f"pipe{suffix}", "--to", "folded", "--force")
    assert "no ordinary file" in line
    assert (out / f"pipe{suffix}").is_fifo()


@both_formats
def test_a_folder_that_must_not_be_written_to(source, out, suffix):
    if os.name != "posix" or os.geteuid() == 0:
        pytest.skip("the owner of this process may write everywhere")
    out.chmod(0o555)
    try:
        line = fails(4, "convert", source, out / f"out{suffix}", "--to", "folded")
    finally:
        out.chmod(0o755)
    assert line.endswith("Permission denied")
    assert files_in(out) == {}


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that nobody can write")
@both_formats
def test_a_folder_that_nobody_can_write_to(source, suffix):
    line = fails(4, "convert", source, f"/proc/self/out{suffix}", "--to", "folded")
    assert line.startswith(f"wnkernel: /proc/self/out{suffix}: ")


@posix_only
@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@both_formats
def test_signals_while_a_file_is_written(source, out, suffix, name, monkeypatch):
    def twice(self, data):
        written = write(self, data)
        try:
            receive(number)
        finally:
            receive(number)  # while the first is on its way out
        return written

    target, number, write = out / f"out{suffix}", getattr(signal, name), Writer.write
    before = signal.getsignal(number)
    target.write_text("precious")
    monkeypatch.setattr(Writer, "write", twice)
    line = fails(128 + number, "convert", source, target, "--to", "folded", "--force")
    assert signal.getsignal(number) is before
    assert line == f"wnkernel: ended by {name}; nothing was written"
    assert files_in(out) == {target.name: b"precious"}


@posix_only
@pytest.mark.usefixtures("heard")
@both_formats
def test_under_nohup_a_hangup_is_not_heard_and_other_signals_are(source, out, suffix, monkeypatch):
    def with_signals(self, data):
        for number in sent:
            receive(number)
        return write(self, data)

    target, write, sent = out / f"out{suffix}", Writer.write, [signal.SIGHUP]
    monkeypatch.setattr(Writer, "write", with_signals)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    convert(source, target, "folded")
    before = files_in(out)
    sent.append(signal.SIGTERM)
    fails(128 + signal.SIGTERM, "convert", source, target, "--to", "folded", "--force")
    assert files_in(out) == before


@both_formats
def test_a_file_has_no_name_while_it_is_written(source, out, suffix, monkeypatch):
    """Nothing is left of it then, however the process ends."""
    try:
        os.close(os.open(out, os.O_TMPFILE | os.O_WRONLY))
    except (AttributeError, OSError):
        pytest.skip("this system, or the disk of the tests, has no files without a name")

    def watched(self, data):
        seen.append(files_in(out))
        return write(self, data)

    seen, write = [], Writer.write
    monkeypatch.setattr(Writer, "write", watched)
    convert(source, out / f"out{suffix}", "folded")
    assert len(seen) > 1
    assert not any(seen)


@both_formats
def test_a_bug_while_writing_leaves_nothing_behind(source, out, suffix, monkeypatch):
    def broken(self, data):
        raise ZeroDivisionError

    monkeypatch.setattr(Writer, "write", broken)
    assert invoke("convert", source, out / f"out{suffix}", "--to", "folded").exit_code == BUG
    assert files_in(out) == {}


def test_a_file_that_somebody_else_makes_meanwhile_stays(tmp_path, out, monkeypatch):
    save(trained("legacy").state_dict(), tmp_path / "in.pt")
    commit = output.Outputs.commit

    def late(self):
        (out / "out.pt").write_text("precious")
        return commit(self)

    monkeypatch.setattr(output.Outputs, "commit", late)
    fails(4, "convert", tmp_path / "in.pt", out / "out.pt", "--to", "folded")
    assert files_in(out) == {"out.pt": b"precious"}


def no_link(*_):
    raise OSError(errno.EPERM, "Operation not permitted")


def without(monkeypatch, *features):
    """As on a file system without files that have no name, or without hard links."""
    if "nameless files" in features:
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    if "hard links" in features:
        monkeypatch.setattr(os, "link", no_link)


def not_permitted(*_):
    raise PermissionError(errno.EPERM, "not permitted")


def interrupted(*_):
    signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize(("strike", "code"), [(not_permitted, 4), (interrupted, 130)])
@pytest.mark.parametrize("lacking", [(), ("nameless files",)], ids=str)
def test_what_strikes_while_a_file_is_made_leaves_none(
    tmp_path, out, monkeypatch, lacking, strike, code
):
    save(trained("legacy").state_dict(), tmp_path / "in.pt")
    (out / "out.pt").write_bytes(b"precious")
    without(monkeypatch, *lacking)
    monkeypatch.setattr(os, "chmod", strike)
    fails(code, "convert", tmp_path / "in.pt", out / "out.pt", "--to", "folded", "--force")
    assert files_in(out) == {"out.pt": b"precious"}


def test_a_file_system_without_hard_links(tmp_path, out, monkeypatch):
    save(trained("legacy").state_dict(), tmp_path / "in.pt")
    without(monkeypatch, "nameless files", "hard links")
    convert(tmp_path / "in.pt", out / "out.pt", "folded")
    assert list(files_in(out)) == ["out.pt"]


@pytest.mark.parametrize(
    "lacking", [(), ("nameless files",), ("nameless files", "hard links")], ids=str
)
def test_shards_are_replaced_together_or_not_at_all(tmp_path, out, monkeypatch, lacking):
    index = split(trained("legacy").state_dict(), tmp_path, ".bin")
    convert(index, out / index.name, "parametrized")
    (out / index.name).unlink()  # one of four is new
    before, replace, calls = files_in(out), os.replace, []

    def third_fails(*paths):
        calls.append(paths)
        if len(calls) == 3:
            raise OSError(errno.EIO, "Input/output error")
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", third_fails)
        without(patch, *lacking)
        line = fails(4, "convert", index, out / index.name, "--to", "folded", "--force")
    assert line.endswith("-00003-of-00003.bin: Input/output error")
    assert files_in(out) == before
    convert(index, out / index.name, "folded", "--force")
    assert files_in(out).keys() == before.keys() | {index.name}
    assert "pre.weight" in join(out / index.name)[0]


@pytest.mark.parametrize("lacking", [(), ("nameless files",)], ids=str)
def test_shards_appear_together_or_not_at_all(tmp_path, out, monkeypatch, lacking):
    index = split(trained("legacy").state_dict(), tmp_path, ".bin")
    replace, calls = os.link, []

    def third_fails(*paths, **options):
        calls.append(paths)
        if len(calls) == 3:
            raise FileExistsError(errno.EEXIST, "File exists")
        replace(*paths, **options)

    without(monkeypatch, *lacking)
    monkeypatch.setattr(os, "link", third_fails)
    fails(4, "convert", index, out / index.name, "--to", "folded")
    assert len(calls) == 3
    assert files_in(out) == {}


@posix_only
def test_permissions_are_those_of_any_new_file_or_of_the_one_replaced(tmp_path, out):
    save(trained("legacy").state_dict(), tmp_path / "in.pt")
    (out / "other").touch()
    convert(tmp_path / "in.pt", out / "out.pt", "folded")
    assert (out / "out.pt").stat().st_mode == (out / "other").stat().st_mode
    (out / "out.pt").chmod(0o600)
    convert(tmp_path / "in.pt", out / "out.pt", "folded", "--force")
    assert (out / "out.pt").stat().st_mode & 0o777 == 0o600


@posix_only
@pytest.mark.parametrize("name", ["/dev/stdout", "log.pt"])
def test_the_file_that_standard_output_goes_to_is_not_replaced(tmp_path, out, name):
    save(trained("legacy").state_dict(), tmp_path / "in.pt")
    before = os.dup(1)
    with (out / "log.pt").open("w") as log:
        os.dup2(log.fileno(), 1)
        try:
            line = fails(4, "convert", tmp_path / "in.pt", out / name, "--to", "folded", "--force")
        finally:
            os.dup2(before, 1)
            os.close(before)
    assert "is standard output" in line
    assert files_in(out) == {"log.pt": b""}


def held():
    """KiB of this process that are no files, in memory or swapped out."""
    with open("/proc/self/status") as file:
        fields = (line.split() for line in file)
        return sum(int(field[1]) for field in fields if field[0] in ("RssAnon:", "VmSwap:"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_safetensors_file_may_be_larger_than_memory(tmp_path, out, monkeypatch):
    """24 layers of 4 MiB; no more than a few of them are held at once."""
    state = {}
    for k in range(24):
        key = f"{k}.parametrizations.weight.original"
        state |= {f"{key}0": torch.ones(1024, 1), f"{key}1": torch.full((1024, 1024), 0.5)}
    save(state, tmp_path / "in.safetensors")
    write, seen = Writer.write, []

    def watch(self, data):
        seen.append(held())
        return write(self, data)

    monkeypatch.setattr(Writer, "write", watch)
    convert(tmp_path / "in.safetensors", out / "out.safetensors", "folded")
    assert max(seen) - seen[0] < 32 * 1024
    assert len(load(out / "out.safetensors")) == 24
