"""A conversion that is killed leaves every file as it was, or as it is when all is done."""

from __future__ import annotations

import hashlib
import json
import os
import signal

import pytest

from ..cli.test_shards import split
from ..command_line import on_the_cpu, save, trained
from ..processes import python
from . import cases

pytest.importorskip("typer", reason="the command line needs typer")

from wnkernel.cli.drafts import Draft

__all__ = ["on_the_cpu"]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes of POSIX")


MOST = 300
"""Of one process."""


def names_at_once(folder):
    """Whether files are hidden there while they are written, for want of better."""
    draft = Draft(folder / "probe")
    draft.discard()
    return draft._name is not None


@pytest.mark.parametrize(
    ("name", "there"),
    [("x.pt", True), ("x.safetensors", False), ("model.safetensors.index.json", True)],
)
def test_killed_at_any_line(tmp_path, request, name, there):
    source, out = tmp_path / "in", tmp_path / "out"
    for folder in (source, out):
        folder.mkdir()
    state = trained("legacy").state_dict()
    if name.endswith(".json"):
        split(state, source, ".safetensors")
    else:
        save(state, source / name)
    old = {path.name: b"old " + path.name.encode() for path in source.iterdir() if there}
    for file, content in old.items():
        (out / file).write_bytes(content)
    seed = request.config.getoption("--seed")
    options = ["--force"] if there else []
    ended = python(
        *("-m", "tests.fuzz.killed", str(out), str(min(cases(12), MOST)), str(seed), "convert"),
        *(str(source / name), str(out / name), "--to", "folded", *options),
    )
    assert ended.returncode == 0, ended.stderr
    whole, *killed = json.loads(ended.stdout.splitlines()[-1])
    assert whole["code"] == 0, ended.stderr
    assert whole["files"].keys() == {path.name for path in source.iterdir()}
    hidden = names_at_once(out)
    before = {file: hashlib.sha256(content).hexdigest() for file, content in old.items()}
    for run in killed:
        assert run["code"] == -signal.SIGKILL, run
        assert run["files"].keys() >= before.keys(), run
        for file, content in run["files"].items():
            if file in whole["files"]:
                assert content in (whole["files"][file], before.get(file)), run
            else:  # only between two names of a whole file
                assert content in {*whole["files"].values(), *before.values()} or hidden, run
