"""Files that were changed at random: the command line ends as it says, or writes a checkpoint."""

from __future__ import annotations

import io
import json
import sys
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from ..cli.test_parameter_order import Late, adam, model, trained
from ..command_line import on_the_cpu
from ..command_line import trained as weights
from . import cases, mutations
from .reader import Reader

__all__ = ["on_the_cpu"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")

as_many = settings(max_examples=cases(200), deadline=None, derandomize=not cases(0))
layouts = st.sampled_from(["legacy", "parametrized", "folded"])
suffixes = st.sampled_from([".pt", ".safetensors"])


def pickled(content, *, old=False):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not old)
    return file.getvalue()


def training():
    net = model(Late, "legacy")
    _, optimizer = trained(net, adam(net))
    return {"model": net.state_dict(), "opt": optimizer.state_dict(), "epoch": 3}


PAIR = {"a.weight_g": torch.ones(4, 1), "a.weight_v": torch.ones(4, 3), "a.bias": torch.ones(4)}
STATES = [PAIR, weights("legacy", tied=True).state_dict(), weights("parametrized").state_dict()]
ZIPS = [pickled(content) for content in (*STATES, training())]
OLD = [pickled(content, old=True) for content in (PAIR, training())]
SAFE = [save({k: t.clone() for k, t in s.items()}, {"format": "pt"}) for s in (PAIR, *STATES[2:])]
INDEX = {
    "metadata": {"total_size": 112, "total_parameters": 28},
    "weight_map": {"a.weight_g": "g.safetensors", "a.weight_v": "v.bin", "a.bias": "g.safetensors"},
}


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    found = Reader(tmp_path_factory.mktemp("strange") / "files")
    found.folder.mkdir()
    yield found
    found.close()
    assert not list(found.folder.parent.rglob("canary"))


def check(reader, content, name, to, out):
    source = reader.folder / name
    source.write_bytes(content)
    reader.check(source, to, out)


@given(st.data())
@as_many
def test_files_of_torch(reader, data):
    """Half of them by their parts and whole operations of their pickles: random bytes are mostly
    found by the checksums."""
    name = data.draw(st.sampled_from(["in.pt", "in"]))
    to, out = data.draw(layouts), data.draw(suffixes)
    content = data.draw(st.sampled_from(ZIPS + OLD))
    is_zip = content in ZIPS
    kind = data.draw(
        st.sampled_from(["bytes", "pickle", "parts"] if is_zip else ["bytes", "pickle"])
    )
    if kind == "pickle":
        content = with_pickle(content, data.draw(mutations.steps(mutations.PICKLES, 6)), is_zip)
    elif kind == "parts":
        content = mutations.of_zip(content, data.draw(mutations.steps(mutations.PARTS)), ZIPS)
    if kind == "bytes":
        content = mutations.of_bytes(
            content, data.draw(mutations.steps(mutations.BYTES)), ZIPS + OLD + SAFE
        )
    check(reader, content, name, to, out)


def with_pickle(content, steps, is_zip):
    """A file of torch in which the pickle of the content has changed."""
    if not is_zip:  # a number, a version, a description of the system, and the content
        file = io.BytesIO(content)
        starts = []
        for _ in range(4):
            starts.append(file.tell())
            list(mutations.pickletools.genops(file))
        before, inside = content[: starts[3]], content[starts[3] : file.tell()]
        return before + mutations.of_pickle(inside, steps) + content[file.tell() :]
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = {part: archive.read(part) for part in archive.namelist()}
    changed = [
        (part, mutations.of_pickle(inside, steps) if part.endswith("data.pkl") else inside)
        for part, inside in parts.items()
    ]
    return mutations.zipped(changed)


@given(st.data())
@as_many
def test_safetensors_files(reader, data):
    name = data.draw(st.sampled_from(["in.safetensors", "in"]))
    to, out = data.draw(layouts), data.draw(suffixes)
    content = data.draw(st.sampled_from(SAFE))
    if data.draw(st.booleans()):
        length = int.from_bytes(content[:8], "little")
        header = mutations.of_json(
            content[8 : 8 + length], data.draw(mutations.steps(mutations.JSON))
        )
        content = len(header).to_bytes(8, "little") + header + content[8 + length :]
    if data.draw(st.booleans()):
        content = mutations.of_bytes(
            content, data.draw(mutations.steps(mutations.BYTES)), SAFE + ZIPS
        )
    check(reader, content, name, to, out)


@given(st.data())
@as_many
def test_indexes(reader, data):
    to = data.draw(layouts)
    out = data.draw(st.sampled_from([".pt", ".safetensors", ".bin.index.json"]))
    shard = pickled({"a.weight_v": PAIR["a.weight_v"]})
    (reader.folder / "v.bin").write_bytes(shard)
    (reader.folder / "v.safetensors").write_bytes(save({"a.weight_v": PAIR["a.weight_v"]}))
    (reader.folder / "g.safetensors").write_bytes(
        save({key: PAIR[key] for key in ("a.weight_g", "a.bias")})
    )
    text = json.dumps(INDEX).replace(
        "v.bin", data.draw(st.sampled_from(["v.safetensors", "v.bin"]))
    )
    content = text.encode()
    if data.draw(st.booleans()):
        content = mutations.of_json(content, data.draw(mutations.steps(mutations.JSON)))
    else:
        content = mutations.of_bytes(content, data.draw(mutations.steps(mutations.BYTES)), SAFE)
    check(reader, content, "in.safetensors.index.json", to, out)
