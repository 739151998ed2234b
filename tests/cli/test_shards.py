"""``wnkernel convert`` on checkpoints in several files with an index."""

from __future__ import annotations

import json

import pytest
import torch

import wnkernel

pytest.importorskip("safetensors", reason="the command line needs safetensors")

from safetensors import safe_open
from safetensors.torch import save_file

from ..command_line import (
    WEIGHTS,
    Net,
    by_key,
    convert,
    fails,
    files_in,
    load,
    on_the_cpu,
    outputs,
    save,
    small_chunks,
    trained,
)
from ..layers import assert_same_state

__all__ = ["on_the_cpu", "small_chunks"]

NAMES = {
    ".safetensors": ("model-{:05d}-of-00003.safetensors", "model.safetensors.index.json"),
    ".bin": ("pytorch_model-{:05d}-of-00003.bin", "pytorch_model.bin.index.json"),
}
both_formats = pytest.mark.parametrize("suffix", NAMES)


def nbytes(state):
    return sum(t.numel() * t.element_size() for t in state.values())


def numel(state):
    return sum(t.numel() for t in state.values())


def split(state, folder, suffix, *, more=None):
    """Three shards, dealt out key by key, so that g and v are never in one; returns the index."""
    shard, index = NAMES[suffix]
    parts = [{}, {}, {}]
    for i, (key, t) in enumerate(state.items()):
        parts[i % 3][key] = t
    weight_map = {}
    for i, part in enumerate(parts, 1):
        save(part, folder / shard.format(i))
        weight_map |= dict.fromkeys(part, shard.format(i))
    metadata = {"total_size": nbytes(state), "total_parameters": numel(state), **(more or {})}
    content = {"metadata": metadata, "weight_map": weight_map}
    (folder / index).write_text(json.dumps(content))
    return folder / index


def join(index):
    """All tensors, each from the file where the index says it is; and the index."""
    content = json.loads(index.read_text())
    state = {}
    for key, name in content["weight_map"].items():
        state[key] = load(index.with_name(name))[key]
    for name in set(content["weight_map"].values()):
        assert load(index.with_name(name)).keys() <= state.keys()
    return state, content


@pytest.fixture
def folders(tmp_path):
    """Two."""
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    target.mkdir()
    return source, target


@pytest.mark.parametrize("out", NAMES)
@both_formats
@pytest.mark.parametrize("to", ["legacy", "folded"])
def test_pairs_in_different_shards(folders, small_chunks, suffix, out, to):
    source, target = folders
    net = trained("parametrized")
    state = net.state_dict()
    index = split(state, source, suffix, more={"note": "kept"})
    said = convert(index, target / NAMES[out][1], to)
    assert {c["weight"] for c in said["changes"]} == set(WEIGHTS)
    got, content = join(target / NAMES[out][1])
    expected = wnkernel.convert_state_dict(state, to=to)
    assert_same_state(by_key(got), by_key(expected))
    assert content["metadata"] == {
        "note": "kept",
        "total_size": nbytes(expected),
        "total_parameters": numel(expected),
    }
    names = [NAMES[out][0].format(i) for i in (1, 2, 3)] + [NAMES[out][1]]
    assert sorted(files_in(target)) == sorted(names)
    assert said["written"] == [str(target / name) for name in names]
    plain = Net(to).eval()
    plain.load_state_dict(got, strict=True)
    torch.testing.assert_close(outputs(plain), outputs(net))


@both_formats
def test_v_stays_in_its_file_and_so_do_all_that_are_not_converted(folders, suffix):
    source, target = folders
    state = trained("legacy").state_dict()
    before = json.loads(split(state, source, suffix).read_text())["weight_map"]
    convert(source / NAMES[suffix][1], target / NAMES[suffix][1], "folded")
    after = json.loads((target / NAMES[suffix][1]).read_text())["weight_map"]
    for weight in WEIGHTS:
        assert after.pop(weight) == before[f"{weight}_v"]
    assert after == {key: before[key] for key in after}


@both_formats
def test_shards_into_one_file(folders, suffix):
    source, target = folders
    state = trained("legacy").state_dict()
    index = split(state, source, suffix)
    expected = wnkernel.convert_state_dict(state, to="parametrized")
    for name in ("one.safetensors", "one.pt"):
        convert(index, target / name, "parametrized")
        assert_same_state(by_key(load(target / name)), by_key(expected))


def test_metadata_of_shards_is_kept(folders):
    source, target = folders
    index = split(trained("legacy").state_dict(), source, ".safetensors")
    convert(index, target / index.name, "folded")
    with safe_open(target / "model-00002-of-00003.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    shard = source / "model-00002-of-00003.safetensors"
    save_file(load(shard), shard, {"step": "7"})
    for out in ("one.pt", "pytorch_model.bin.index.json"):
        (warning,) = convert(index, target / out, "folded")["warnings"]
        assert "{'step': '7'}" in warning


def test_a_shard_that_only_held_g_is_gone(folders):
    source, target = folders
    state = {"conv.weight_g": torch.ones(3, 1), "conv.weight_v": torch.ones(3, 2)}
    index = split(state, source, ".safetensors")
    (source / "model-00003-of-00003.safetensors").unlink()  # of no key
    convert(index, target / index.name, "folded")
    names = ["model-00001-of-00001.safetensors", "model.safetensors.index.json"]
    assert sorted(files_in(target)) == names


def test_tied_tensors_in_a_shard_of_torch_stay_tied(folders):
    source, target = folders
    state = trained("legacy", tied=True).state_dict()
    name = "pytorch_model-00001-of-00001.bin"
    torch.save(dict(state), source / name)
    index = source / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(state, name)}))
    convert(index, target / index.name, "folded")
    got = load(target / name)
    assert got["heads.0.weight"].data_ptr() == got["heads.1.weight"].data_ptr()
    for out in ("one.safetensors", "model.safetensors.index.json"):
        said = convert(index, target / out, "folded")
        assert any("heads.0.weight_v and heads.1.weight_v" in text for text in said["warnings"])


def test_a_dry_run_of_shards_writes_nothing(folders):
    source, target = folders
    index = split(trained("legacy").state_dict(), source, ".safetensors")
    dry = convert(index, target / index.name, "folded", "--dry-run")
    assert len(dry["changes"]) == len(WEIGHTS)
    assert files_in(target) == {}
    (target / "model-00003-of-00003.safetensors").touch()
    line = fails(4, "convert", index, target / index.name, "--to", "folded", "--dry-run")
    assert "model-00003-of-00003.safetensors: exists already" in line


def test_shards_do_not_replace_themselves(folders):
    source, _ = folders
    index = split(trained("legacy").state_dict(), source, ".safetensors")
    before = files_in(source)
    for out in (index, source / "model-00002-of-00003.safetensors"):
        line = fails(2, "convert", index, out, "--to", "folded", "--force")
        assert "is the input" in line
    other = source / "model.bin.index.json"
    (source / "model-00003-of-00003.bin").symlink_to("model-00002-of-00003.safetensors")
    before = files_in(source)
    assert "is the input" in fails(2, "convert", index, other, "--to", "folded", "--force")
    assert files_in(source) == before


def test_one_file_does_not_become_shards(folders):
    source, target = folders
    for suffix in (".pt", ".safetensors"):
        save(trained("legacy").state_dict(), source / f"in{suffix}")
        out = target / "model.safetensors.index.json"
        line = fails(2, "convert", source / f"in{suffix}", out, "--to", "folded")
        assert "name one file" in line


def test_shards_into_a_name_that_says_nothing(folders):
    source, target = folders
    index = split(trained("legacy").state_dict(), source, ".safetensors")
    assert "name one file, or an index" in fails(
        2, "convert", index, target / "model", "--to", "folded"
    )
    assert "such as model.safetensors" in fails(
        2, "convert", index, target / "model.index.json", "--to", "folded"
    )


def bad_index(folder, change):
    index = split(trained("legacy").state_dict(), folder, ".safetensors")
    torch.save({}, folder / "x.bin")
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))
    return index


OUTSIDE = "model-00001-of-00003.safetensors"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update(extra=OUTSIDE), "extra is not in"),
        (lambda m: m.update({"pre.bias": "../in/" + OUTSIDE}), "no file beside the index"),
        (lambda m: m.update({"pre.bias": "/etc/passwd"}), "no file beside the index"),
        (lambda m: m.update({"pre.bias": ".."}), "no file beside the index"),
        (lambda m: m.update({"pre.bias": "."}), "no file beside the index"),
        (lambda m: m.update({"pre.bias": ""}), "no file beside the index"),
        (lambda m: m.update({"pre.bias": "a\0b.safetensors"}), "no file beside the index"),
        (lambda m: m.update({"pre.bias": "\ud800.safetensors"}), "not UTF-8"),
        (lambda m: m.update({"pre.bias": "a" * 300}), "File name too long"),
        (lambda m: m.update({"pre.bias": 7}), "no file beside the index"),
        (lambda m: m.update({"pre.bias": ["x"]}), "no file beside the index"),
        (lambda m: m.update({"pre.bias": "x.bin"}), "different formats"),
        (lambda m: m.update({"pre.bias": "no.safetensors"}), "No such file"),
        (lambda m: m.clear(), "weight_map"),
    ],
)
def test_an_index_that_is_wrong(folders, change, said):
    source, target = folders
    index = bad_index(source, change)
    assert said in fails(3, "convert", index, target / index.name, "--to", "folded")
    assert files_in(target) == {}


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"weight_map": []}', "\xff"])
def test_an_index_that_is_none(folders, text):
    source, target = folders
    index = source / "model.safetensors.index.json"
    index.write_bytes(text.encode("latin-1"))
    fails(3, "convert", index, target / index.name, "--to", "folded")


def test_a_key_in_two_shards(folders):
    source, target = folders
    index = split(trained("legacy").state_dict(), source, ".safetensors")
    save({"pre.bias": torch.ones(8)}, source / "model-00003-of-00003.safetensors")
    assert "is in model-0000" in fails(3, "convert", index, target / "o.pt", "--to", "folded")


def test_a_shard_that_is_no_dict_of_tensors(folders):
    source, target = folders
    index = split(trained("legacy").state_dict(), source, ".bin")
    torch.save({"state_dict": {}}, source / "pytorch_model-00002-of-00003.bin")
    assert "dict of tensors" in fails(3, "convert", index, target / "o.pt", "--to", "folded")
