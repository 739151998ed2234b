"""``wnkernel convert`` onto disks that are full, or that cannot be written to."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from ..command_line import fails, files_in, on_the_cpu, out, save
from ..processes import PATIENCE_S, ROOT

__all__ = ["on_the_cpu", "out"]


@contextmanager
def full_disk():
    """A limit on the size of files: the system refuses to write on, as on a full disk."""
    resource = pytest.importorskip("resource", reason="limits of POSIX")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        yield os.strerror(errno.EFBIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin.index.json"])
def test_a_full_disk(tmp_path, out, suffix, there):
    state = {"a.weight_g": torch.ones(64, 1), "a.weight_v": torch.ones(64, 2**10)}
    source, target, too_large = tmp_path / f"in{suffix}", out / f"out{suffix}", f"out{suffix}"
    if suffix == ".bin.index.json":
        save({"a.weight_g": state["a.weight_g"], "a.bias": torch.ones(64)}, tmp_path / "g.bin")
        save({"a.weight_v": state["a.weight_v"]}, tmp_path / "v.bin")
        weight_map = {"a.bias": "g.bin", "a.weight_g": "g.bin", "a.weight_v": "v.bin"}
        source.write_text(json.dumps({"weight_map": weight_map}))
        too_large = "out-00002-of-00002.bin"
    else:
        save(state, source)
    if there:
        target.write_text("precious")
    with full_disk() as why:
        line = fails(4, "convert", source, target, "--to", "parametrized", "--force")
    assert line == f"wnkernel: {out / too_large}: {why}"
    assert files_in(out) == ({target.name: b"precious"} if there else {})


ON_A_DISK = """
mount -t tmpfs -o size=16k none "$2" && echo old > "$2/out.pt" || exit 77
"$0" -m wnkernel convert "$1" "$2/out.pt" --to folded --force; echo $?
mount -o remount,ro none "$2" || exit 77
"$0" -m wnkernel convert "$1" "$2/out.pt" --to folded --force; echo $?
ls -A "$2"; cat "$2/out.pt"
"""
"""On a disk of 16 KiB, and on one that cannot be written to, in a name space of their own."""


def test_disks_that_are_full_or_read_only(tmp_path, out):
    save({"weight_g": torch.ones(64, 1), "weight_v": torch.ones(64, 99)}, tmp_path / "in.pt")
    if not shutil.which("unshare"):
        pytest.skip("there is no program unshare, with which a disk is made for one process")
    ended = subprocess.run(
        ["unshare", "-rm", "sh", "-c", ON_A_DISK, sys.executable, tmp_path / "in.pt", out],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    if ended.returncode == 77 or ended.stdout == "":
        pytest.skip(f"this process may not make a disk: {ended.stderr}")
    assert ended.stdout.split() == ["4", "4", "out.pt", "old"]
    full, read_only = ended.stderr.splitlines()
    assert full == f"wnkernel: {out / 'out.pt'}: {os.strerror(errno.ENOSPC)}"
    assert read_only == f"wnkernel: {out / 'out.pt'}: {os.strerror(errno.EROFS)}"
