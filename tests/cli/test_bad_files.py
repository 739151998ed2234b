"""``wnkernel convert`` on inputs that are damaged, hostile or contradict themselves: one line, exit
code 3, and nothing is written."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import wnkernel

from ..command_line import convert, fails, files_in, invoke, load, on_the_cpu, save, trained
from ..layers import legacy_weight_norm

__all__ = ["on_the_cpu"]

both_formats = pytest.mark.parametrize("suffix", [".pt", ".safetensors"])


def refused(folder, source, to="parametrized", out="out.pt"):
    """Converting fails with exit code 3; returns what is said after the name of the file."""
    before = files_in(folder)
    line = fails(3, "convert", source, folder / out, "--to", to)
    assert files_in(folder) == before
    assert fails(3, "convert", source, "--to", to, "--dry-run") == line
    prefix = f"wnkernel: {source}: "
    assert line.startswith(prefix)
    return line.removeprefix(prefix)


@pytest.fixture
def layer():
    return legacy_weight_norm(nn.Linear(5, 4)).state_dict()


@pytest.mark.parametrize("out", ["out.pt", "out.safetensors"])
@both_formats
def test_files_that_are_cut_off_anywhere(tmp_path, layer, suffix, out):
    save(layer, tmp_path / f"whole{suffix}")
    whole = (tmp_path / f"whole{suffix}").read_bytes()
    source = tmp_path / f"in{suffix}"
    for length in [0, 1, 7, 8, 9, *range(10, len(whole), len(whole) // 25), len(whole) - 1]:
        source.write_bytes(whole[:length])
        refused(tmp_path, source, out=out)


@both_formats
def test_files_with_more_at_the_end(tmp_path, layer, suffix):
    save(layer, tmp_path / f"in{suffix}")
    whole = (tmp_path / f"in{suffix}").read_bytes()
    (tmp_path / f"in{suffix}").write_bytes(whole + b"more" * 70_000)
    refused(tmp_path, tmp_path / f"in{suffix}")


def test_a_file_of_torch_in_which_any_byte_of_a_tensor_has_changed(tmp_path):
    marker = torch.full((4, 5), 1.25)
    torch.save({"weight_g": torch.ones(4, 1), "weight_v": marker}, tmp_path / "in.pt")
    whole = bytearray((tmp_path / "in.pt").read_bytes())
    start = whole.index(marker.numpy().tobytes())
    for position in (start, start + 41, start + 79):
        damaged = whole.copy()
        damaged[position] ^= 1
        (tmp_path / "in.pt").write_bytes(damaged)
        torch.load(tmp_path / "in.pt", weights_only=True)  # which does not notice
        assert "damaged" in refused(tmp_path, tmp_path / "in.pt")


def test_a_file_saved_without_checksums_is_read(tmp_path, layer):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(layer, tmp_path / "in.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    result = invoke("convert", tmp_path / "in.pt", tmp_path / "out.pt", "--to", "folded")
    assert result.exit_code == 0


def test_a_file_of_torch_before_1_6_is_read(tmp_path, layer):
    torch.save(layer, tmp_path / "in.pth", _use_new_zipfile_serialization=False)
    result = invoke("convert", tmp_path / "in.pth", tmp_path / "out.pth", "--to", "parametrized")
    assert result.exit_code == 0
    expected = wnkernel.convert_state_dict(layer, to="parametrized")
    assert list(load(tmp_path / "out.pth")) == list(expected)


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, call, *arguments):
        self.how = call, arguments

    def __reduce__(self):
        return self.how


@pytest.mark.parametrize("kind", ["zip", "before 1.6", "plain pickle"])
@pytest.mark.parametrize("below", ["generator", "state"])
def test_pickles_that_run_code_are_refused_and_none_of_it_runs(tmp_path, layer, kind, below):
    proof = tmp_path / "the code ran"
    for call in (Evil(os.system, f"touch '{proof}'"), Evil(eval, f"open({str(proof)!r}, 'w')")):
        content = layer | {below: {"inner": call}}
        source = tmp_path / "in.pt"
        if kind == "plain pickle":
            source.write_bytes(pickle.dumps(content))
            with source.open("rb") as file:
                pickle.load(file)  # as torch.load(weights_only=False) would
        else:
            torch.save(content, source, _use_new_zipfile_serialization=kind == "zip")
            torch.load(source, weights_only=False)
        assert proof.exists()  # it does run where it may
        proof.unlink()
        said = refused(tmp_path, source)
        assert not proof.exists()
        if kind != "plain pickle":
            name = "system" if call.how[0] is os.system else "eval"
            assert "refused: loading it would run code" in said
            assert name in said
            assert "if you trust the file" in said
            assert "wnkernel.convert_state_dict" in said


def test_other_things_than_checkpoints(tmp_path):
    module = legacy_weight_norm(nn.Linear(5, 4))
    torch.save(nn.Linear(5, 4), tmp_path / "module.pt")
    assert "torch.nn.modules.linear.Linear" in refused(tmp_path, tmp_path / "module.pt")
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "program.pt")
    assert "TorchScript" in refused(tmp_path, tmp_path / "program.pt")
    (tmp_path / "text.pt").write_text("hello, this is no checkpoint")
    assert "damaged, or not a checkpoint" in refused(tmp_path, tmp_path / "text.pt")
    (tmp_path / "text.safetensors").write_text("hello, this is no checkpoint")
    assert "not a safetensors file" in refused(tmp_path, tmp_path / "text.safetensors")
    (tmp_path / "README").write_text("hello, this is no checkpoint")
    assert "neither its name nor its contents" in refused(tmp_path, tmp_path / "README")
    (tmp_path / "folder.pt").mkdir()
    assert "directory" in refused(tmp_path, tmp_path / "folder.pt")
    (tmp_path / "folder.safetensors").mkdir()
    refused(tmp_path, tmp_path / "folder.safetensors")
    for name in ("missing.pt", "missing.safetensors", "missing"):
        assert refused(tmp_path, tmp_path / name) == "No such file or directory"
    torch.save(module.state_dict(), tmp_path / "in.safetensors")  # by another name
    refused(tmp_path, tmp_path / "in.safetensors")


@pytest.mark.parametrize("content", [torch.ones(3), 7, None, [], {}, "text", {1: torch.ones(2)}])
def test_a_file_of_torch_with_anything_else_has_nothing_to_convert(tmp_path, content):
    torch.save(content, tmp_path / "in.pt")
    line = fails(1, "convert", tmp_path / "in.pt", tmp_path / "out.pt", "--to", "folded")
    assert "nothing to convert" in line


@pytest.mark.parametrize("to", ["legacy", "parametrized", "folded"])
@both_formats
def test_a_weight_in_two_layouts_that_differ(tmp_path, suffix, to):
    state = trained("legacy").state_dict()
    both = state | wnkernel.convert_state_dict(state, to="parametrized")
    both["rnn.weight_hh_l0_v"] = both["rnn.weight_hh_l0_v"] + 1e-6
    save({key: t.clone() for key, t in both.items()}, tmp_path / f"in{suffix}")
    said = refused(tmp_path, tmp_path / f"in{suffix}", to)
    assert "rnn.parametrizations.weight_hh_l0.original1" in said
    assert "rnn.weight_hh_l0_v" in said


@pytest.mark.parametrize("to", ["legacy", "folded"])
@both_formats
def test_a_folded_weight_beside_a_pair_that_gives_another(tmp_path, suffix, to):
    state = trained("parametrized").state_dict()
    state["pre.weight"] = torch.zeros(8, 3, 3)
    save(state, tmp_path / f"in{suffix}")
    assert '"pre.weight"' in refused(tmp_path, tmp_path / f"in{suffix}", to)


@both_formats
def test_half_of_a_weight_norm(tmp_path, suffix):
    state = trained("parametrized").state_dict()
    del state["ups.0.parametrizations.weight.original0"]
    save(state, tmp_path / f"in{suffix}")
    said = refused(tmp_path, tmp_path / f"in{suffix}", "legacy")
    assert '"ups.0.parametrizations.weight.original0"' in said


def test_the_part_of_the_file_that_contradicts_itself_is_named(tmp_path):
    good, bad = (trained("parametrized").state_dict() for _ in range(2))
    del bad["pre.parametrizations.weight.original0"]
    torch.save({"generator": good, "ema": [bad]}, tmp_path / "in.pt")
    assert refused(tmp_path, tmp_path / "in.pt", "legacy").startswith("ema[0]: ")


def test_a_key_with_a_line_break_does_not_break_the_line(tmp_path):
    torch.save({"a\nb.parametrizations.weight.original0": torch.ones(2)}, tmp_path / "in.pt")
    assert r"a\nb.parametrizations" in refused(tmp_path, tmp_path / "in.pt", "legacy")


def test_keys_do_not_talk_to_the_terminal(tmp_path):
    key = "\x1b]0;title\x07\x9b2J\u202eключ.weight"
    shown = r"\x1b]0;title\x07\x9b2J\u202eключ.weight"
    pair = {f"{key}_g": torch.ones(2, 1), f"{key}_v": torch.ones(2, 3)}
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters()).state_dict()
    torch.save({key: {"opt": optimizer, "model": pair}}, tmp_path / "in.pt")
    done = invoke("convert", tmp_path / "in.pt", "--to", "folded", "--dry-run")
    assert done.exit_code == 0
    for text in (done.stdout, done.stderr):
        assert shown in "".join(text.split()).replace("│", "")
        assert all(c.isprintable() or c == "\n" for c in text)
    torch.save({f"{key}_g": torch.ones(2, 1)}, tmp_path / "in.pt")
    line = fails(1, "convert", tmp_path / "in.pt", "--to", "folded", "--dry-run")
    assert f"{shown}_g may be half of one" in line


def test_a_file_named_as_one_of_another_kind_is_told_from_a_damaged_one(tmp_path, layer):
    torch.save(layer, tmp_path / "in.safetensors")
    save_file(layer, tmp_path / "in.pt")
    torch.save(layer, tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
    for name, kind in (("in.safetensors", "torch"), ("in.pt", "safetensors")):
        said = refused(tmp_path, tmp_path / name)
        assert said == f"looks like a file of {kind} by its contents; rename it"
    assert "looks like a file of torch" in refused(tmp_path, tmp_path / "old.safetensors")


@pytest.mark.skipif(sys.platform != "linux", reason="names of other bytes")
@both_formats
def test_a_file_whose_name_is_not_utf_8(tmp_path, layer, suffix):
    save(layer, tmp_path / f"in{suffix}")
    source = tmp_path / os.fsdecode(b"\xff" + suffix.encode())
    (tmp_path / f"in{suffix}").rename(source)
    line = fails(3, "convert", source, tmp_path / "out.pt", "--to", "folded")
    assert r"/\udcff" in line
    assert "a name that is not UTF-8" in line


def test_a_missing_input_is_told_before_anything_of_the_output(tmp_path):
    for out in ("out.pt", "out.safetensors"):
        (tmp_path / out).write_text("precious")
        for options in ([], ["--force"], ["--force", "--dry-run"]):
            arguments = (tmp_path / "no.pt", tmp_path / out, "--to", "folded", *options)
            line = fails(3, "convert", *arguments)
            assert line == f"wnkernel: {tmp_path / 'no.pt'}: No such file or directory"
    assert set(files_in(tmp_path).values()) == {b"precious"}


@pytest.mark.parametrize("dtype", ["Q5", "F4"])  # the library knows F4, torch does not
def test_a_safetensors_header_with_a_dtype_that_nobody_knows(tmp_path, dtype):
    header = json.dumps({"x": {"dtype": dtype, "shape": [2], "data_offsets": [0, 1]}}).encode()
    content = len(header).to_bytes(8, "little") + header + b"\0"
    (tmp_path / "in.safetensors").write_bytes(content)
    refused(tmp_path, tmp_path / "in.safetensors")


def without_values(t):
    return t.to("meta")


def quantized(t):
    return torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)


def to_complex(t):
    return t.to(torch.complex128)


@pytest.mark.parametrize("kind", [without_values, torch.Tensor.to_sparse, quantized])
@pytest.mark.parametrize("name", ["in.pt", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("to", ["parametrized", "folded"])
def test_g_and_v_that_are_no_dense_tensors_with_values(tmp_path, layer, kind, name, to):
    """Among others that are."""
    state = {f"good.{key}": t for key, t in layer.items()} | layer
    state["weight_v"] = kind(layer["weight_v"])
    shown = {without_values: "meta", quantized: "quantized"}.get(kind, "sparse")
    source = tmp_path / name
    if name == "in.pt":
        torch.save({"model": state}, source)
    else:
        torch.save(state, tmp_path / "shard.bin")
        source.write_text(json.dumps({"weight_map": dict.fromkeys(state, "shard.bin")}))
    said = refused(tmp_path, source, to)
    assert 'expected a dense tensor in "weight_v", got ' in said
    assert shown in said


def test_other_tensors_may_be_of_any_kind(tmp_path, layer):
    others = {"bias": layer["bias"].to("meta"), "mask": torch.eye(3).to_sparse()}
    torch.save(layer | others, tmp_path / "in.pt")
    assert invoke("convert", tmp_path / "in.pt", tmp_path / "o.pt", "--to", "folded").exit_code == 0
    got = load(tmp_path / "o.pt")
    assert got["bias"].is_meta
    assert torch.equal(got["mask"].to_dense(), torch.eye(3))


@pytest.mark.parametrize("kind", [without_values, torch.Tensor.to_sparse, quantized, to_complex])
@pytest.mark.parametrize("name", ["in.pt", "pytorch_model.bin.index.json"])
def test_tensors_that_a_safetensors_file_cannot_hold(tmp_path, layer, kind, name):
    state = layer | {"mask": kind(torch.eye(3))}
    torch.save(state, tmp_path / "in.pt")
    if name != "in.pt":
        index = {"weight_map": dict.fromkeys(state, "in.pt")}
        (tmp_path / name).write_text(json.dumps(index))
    before = files_in(tmp_path)
    said = fails(4, "convert", tmp_path / name, tmp_path / "o.safetensors", "--to", "folded")
    assert said.startswith("wnkernel: mask: a safetensors file cannot hold such a tensor (torch.")
    assert files_in(tmp_path) == before


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
@both_formats
def test_a_pipe_is_not_waited_for(tmp_path, suffix):
    os.mkfifo(tmp_path / f"in{suffix}")
    line = fails(3, "convert", tmp_path / f"in{suffix}", "--to", "folded", "--dry-run")
    assert line.endswith("is no ordinary file")


class WithState:
    """Pickled as a call and what is set on its result."""

    def __init__(self, state, call, *arguments):
        self.how = call, arguments, state

    def __reduce__(self):
        return self.how


@pytest.mark.parametrize("name", ["items", "get", "_metadata"])
def test_a_dict_whose_attributes_hide_those_of_its_class(tmp_path, layer, name):
    """_metadata, which the state dicts of modules have, hides nothing."""
    content = {"model": WithState({name: 3}, OrderedDict, list(layer.items()))}
    torch.save(content, tmp_path / "in.pt")
    if name == "_metadata":
        convert(tmp_path / "in.pt", tmp_path / "out.pt", "folded")
    else:
        said = refused(tmp_path, tmp_path / "in.pt")
        assert said == f"refused: it has a OrderedDict with another {name!r}"


def test_a_tensor_whose_attributes_hide_those_of_its_class(tmp_path, layer):
    rebuild = torch._utils._rebuild_parameter_with_state
    for name in ("is_floating_point", "our_own"):
        v = Evil(rebuild, layer["weight_v"], False, OrderedDict(), {name: 3})
        torch.save(layer | {"weight_v": v}, tmp_path / "in.pt")
        if name == "our_own":
            convert(tmp_path / "in.pt", tmp_path / "out.pt", "folded")
        else:
            assert refused(tmp_path, tmp_path / "in.pt").endswith(f"with another {name!r}")


@pytest.mark.parametrize("to", ["parametrized", "folded"])
def test_what_torch_loads_and_cannot_save(tmp_path, layer, to):
    t = layer["bias"]
    arguments = (t._typed_storage(), 0, t.shape, (1,), False, OrderedDict)
    broken = Evil(torch._utils._rebuild_tensor_v2, *arguments)  # its hooks are no dict
    torch.save(layer | {"bias": broken}, tmp_path / "in.pt")
    line = fails(3, "convert", tmp_path / "in.pt", tmp_path / "out.pt", "--to", to)
    assert "in.pt: torch cannot save what is in it: " in line
    assert list(files_in(tmp_path)) == ["in.pt"]
