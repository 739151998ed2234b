"""Out of memory is one kind of error, wherever it strikes, and no small file asks for much."""

from __future__ import annotations

import gc
import json
import random
import sys
import tracemalloc
import zipfile
import zlib

import pytest
import torch

import wnkernel

from ..command_line import convert, fails, files_in, on_the_cpu, save

pytest.importorskip("typer", reason="the command line needs typer")

from wnkernel.cli.limits import memory_limit

__all__ = ["on_the_cpu"]

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")

ROWS = 1 << 14
EXPANDED = {"weight_g": torch.ones(ROWS, 1), "weight_v": torch.ones(1, 1).expand(ROWS, 1 << 20)}
"""64 GiB, in a file of a few KiB."""


@linux_only
@pytest.mark.parametrize(
    ("to", "out"),
    [("folded", "o.pt"), ("folded", "o.safetensors"), ("parametrized", "o.safetensors")],
)
def test_a_weight_that_does_not_fit(tmp_path, to, out):
    torch.save(EXPANDED, tmp_path / "in.pt")
    before = files_in(tmp_path)
    with memory_limit(4 << 30):  # on machines that have 64 GiB too
        line = fails(6, "convert", tmp_path / "in.pt", tmp_path / out, "--to", to)
    assert line.endswith(f"out of memory: {ROWS << 22} bytes were asked for")
    assert files_in(tmp_path) == before


def test_a_path_of_long_keys_takes_little_memory(tmp_path):
    key, nested = "k" * 20_000, {"weight_g": torch.ones(2, 1), "weight_v": torch.ones(2, 3)}
    for _ in range(200):
        nested = {key: nested}
    torch.save(nested, tmp_path / "in.pt")
    assert (tmp_path / "in.pt").stat().st_size < 100_000
    tracemalloc.start()
    try:
        convert(tmp_path / "in.pt", tmp_path / "o.pt", "parametrized")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_a_file_that_is_called_out_of_memory_is_not(tmp_path):
    for name in ("out of memory.pt", "out of memory.safetensors"):
        line = fails(3, "convert", tmp_path / name, tmp_path / "o.pt", "--to", "folded")
        assert line.endswith("No such file or directory")


@linux_only
@pytest.mark.parametrize("name", ["in.pt", "in.safetensors", "old.pt", "in.bin.index.json"])
def test_a_file_that_does_not_fit(tmp_path, name):
    state = {"weight_g": torch.ones(64, 1), "weight_v": torch.zeros(64, 1 << 20)}  # 256 MiB
    source = tmp_path / name
    if name == "old.pt":
        torch.save(state, source, _use_new_zipfile_serialization=False)
    elif name == "in.bin.index.json":
        save(state, tmp_path / "shard.bin")
        source.write_text(json.dumps({"weight_map": dict.fromkeys(state, "shard.bin")}))
    else:
        save(state, source)
    gc.collect()  # files that are mapped, and would make room
    wnkernel.release_cpu_buffers()
    with memory_limit(64 << 20):
        line = fails(6, "convert", source, tmp_path / "out.pt", "--to", "folded")
    assert "out of memory" in line


SIZE = b"\x8a\5" + (3 << 29).to_bytes(5, "little") + b"\x85R"
GLUTTONS = {
    "a bytearray": b"cbuiltins\nbytearray\n" + SIZE,  # 1.5 GiB
    "a tensor": b"ctorch\nFloatTensor\n" + SIZE,
}
"""Pickles without any code, by what they build."""


@linux_only
@pytest.mark.parametrize("kind", ["zip", "before 1.6"])
@pytest.mark.parametrize("pickled", GLUTTONS.values(), ids=GLUTTONS)
def test_a_pickle_that_asks_for_more_than_its_file_can_need(tmp_path, kind, pickled):
    source, content = tmp_path / "in.pt", b"\x80\2" + pickled + b"."
    if kind == "zip":
        repacked(source, {"data.pkl": content})
    else:
        torch.save({}, source, _use_new_zipfile_serialization=False)
        empty = b"\x80\2}q\0."
        assert empty in source.read_bytes()
        source.write_bytes(source.read_bytes().replace(empty, content))
    assert ": out of memory" in fails(6, "convert", source, "--to", "folded", "--dry-run")


def repacked(path, changed, compression=zipfile.ZIP_STORED, times=1):
    """A file of torch with some parts replaced, each in it so many times."""
    torch.save({"weight_g": torch.ones(4, 1), "weight_v": torch.ones(4, 3)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, changed.get(name.rpartition("/")[2], content))
        for _ in range(times - 1):
            archive.filelist += archive.filelist[:]


@pytest.mark.parametrize("part", ["data.pkl", "0"])
def test_a_part_that_unpacks_to_much_more_than_it_takes(tmp_path, part, monkeypatch):
    repacked(tmp_path / "in.pt", {part: bytes(1 << 24)}, zipfile.ZIP_DEFLATED)
    assert (tmp_path / "in.pt").stat().st_size < 1 << 20
    monkeypatch.setattr(zipfile.ZipFile, "open", None)  # it is refused before it is unpacked
    line = fails(3, "convert", tmp_path / "in.pt", "--to", "folded", "--dry-run")
    assert "refused: expected parts that are not compressed" in line
    assert line.endswith(" bytes in " + line.rpartition(" ")[2])


def test_a_compressed_part_of_the_same_length(tmp_path):
    """torch would take the compressed bytes for values."""
    for zeros in range(48):
        content = bytes(zeros) + random.Random(0).randbytes(48 - zeros)
        packed = zlib.compressobj(wbits=-15)
        if len(packed.compress(content) + packed.flush()) == 48:
            break
    repacked(tmp_path / "in.pt", {"1": content}, zipfile.ZIP_STORED)
    convert(tmp_path / "in.pt", tmp_path / "out.pt", "folded")
    with zipfile.ZipFile(tmp_path / "in.pt") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "in.pt", "w") as archive:
        for name, inside in parts.items():
            archive.writestr(name, inside, zipfile.ZIP_DEFLATED if name.endswith("/1") else None)
    line = fails(3, "convert", tmp_path / "in.pt", "--to", "folded", "--dry-run")
    assert line.endswith("data/1 of 48 bytes in 48")


def test_parts_that_are_longer_together_than_the_file(tmp_path):
    repacked(tmp_path / "in.pt", {"data.pkl": bytes(1 << 20)}, times=3)
    line = fails(3, "convert", tmp_path / "in.pt", "--to", "folded", "--dry-run")
    assert line.endswith("damaged: its parts are longer together than the file")
