"""``wnkernel convert``: files of real models from each layout to each, back in torch's modules."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

import wnkernel

pytest.importorskip("safetensors", reason="the command line needs safetensors")

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..command_line import (
    DIMS,
    WEIGHTS,
    Net,
    by_key,
    convert,
    fails,
    files_in,
    invoke,
    load,
    on_the_cpu,
    outputs,
    save,
    small_chunks,
    trained,
)
from ..layers import assert_same_state

__all__ = ["on_the_cpu", "small_chunks"]

BETWEEN = pytest.mark.parametrize(
    ("source", "target"), [("legacy", "parametrized"), ("parametrized", "legacy")]
)
TORCH_SUFFIXES = pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ""])


def folded(net: Net) -> Net:
    """A plain net with the weights that our layers compute."""
    net = copy.deepcopy(net) if not any(m._forward_pre_hooks for m in net.modules()) else net
    wnkernel.convert(net)
    wnkernel.fold(net)
    plain = Net("folded").eval()
    plain.load_state_dict(net.state_dict(), strict=True)
    return plain


@BETWEEN
@TORCH_SUFFIXES
def test_a_file_of_torch_loads_into_torchs_other_weight_norm(tmp_path, suffix, source, target):
    net, other = trained(source), Net(target).eval()
    torch.save(net.state_dict(), tmp_path / f"in{suffix}")
    said = convert(tmp_path / f"in{suffix}", tmp_path / f"out{suffix}", target)
    state = torch.load(tmp_path / f"out{suffix}", weights_only=True)
    assert type(state) is OrderedDict
    other.load_state_dict(state, strict=True)
    assert torch.equal(outputs(other), outputs(net))
    assert [c["weight"] for c in said["changes"]] == list(WEIGHTS)
    assert [c["shape"] for c in said["changes"]] == [list(shape) for shape in WEIGHTS.values()]
    assert [c["dim"] for c in said["changes"]] == DIMS
    assert {(c["where"], c["from"], c["to"]) for c in said["changes"]} == {("", source, target)}
    convert(tmp_path / f"out{suffix}", tmp_path / f"back{suffix}", source)
    back = torch.load(tmp_path / f"back{suffix}", weights_only=True)
    assert_same_state(back, net.state_dict())


@BETWEEN
def test_a_safetensors_file_loads_into_torchs_other_weight_norm(
    tmp_path, small_chunks, source, target
):
    net, other = trained(source), Net(target).eval()
    metadata = {"format": "pt", "step": "7", "name": 'é "x"'}
    save_file(net.state_dict(), tmp_path / "in.safetensors", metadata)
    said = convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", target)
    other.load_state_dict(load_file(tmp_path / "out.safetensors"), strict=True)
    assert torch.equal(outputs(other), outputs(net))
    assert {c["weight"] for c in said["changes"]} == set(WEIGHTS)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == metadata
    convert(tmp_path / "out.safetensors", tmp_path / "back.safetensors", source)
    back = load_file(tmp_path / "back.safetensors")
    assert_same_state(by_key(back), by_key(net.state_dict()))


@pytest.mark.parametrize("source", ["legacy", "parametrized"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_folded_file_has_the_weights_that_our_layers_compute(tmp_path, suffix, source):
    net = trained(source)
    expected = outputs(net)
    save(net.state_dict(), tmp_path / f"in{suffix}")
    convert(tmp_path / f"in{suffix}", tmp_path / f"out{suffix}", "folded")
    plain = Net("folded").eval()
    plain.load_state_dict(load(tmp_path / f"out{suffix}"), strict=True)
    assert_same_state(plain.state_dict(), folded(net).state_dict())
    torch.testing.assert_close(outputs(plain), expected)


@pytest.mark.parametrize("to", ["legacy", "folded"])
def test_a_safetensors_file_is_written_as_the_library_writes_it(tmp_path, small_chunks, to):
    state = trained("parametrized").state_dict()
    state |= {
        "half": torch.linspace(0, 1, 5, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 3),
        "ключ": torch.tensor(1.5, dtype=torch.float64),
        "f8": torch.linspace(0, 1, 3).to(torch.float8_e4m3fn),
    }
    if hasattr(torch, "float8_e8m0fnu"):
        state["e8"] = torch.ones(3).to(torch.float8_e8m0fnu)
        state["e5"] = torch.ones(3).to(torch.float8_e5m2)
    save_file(state, tmp_path / "in.safetensors", {"format": "pt"})
    convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", to)
    by_hand = wnkernel.convert_state_dict(state, to=to)
    save_file(by_hand, tmp_path / "library.safetensors", {"format": "pt"})
    files = files_in(tmp_path)
    assert files["out.safetensors"] == files["library.safetensors"]


@pytest.mark.parametrize("to", ["parametrized", "folded"])
@pytest.mark.parametrize(("source", "target"), [(".pt", ".safetensors"), (".safetensors", ".pt")])
def test_from_one_format_to_another(tmp_path, source, target, to):
    state = trained("legacy").state_dict()
    save(state, tmp_path / f"in{source}")
    convert(tmp_path / f"in{source}", tmp_path / f"out{target}", to)
    expected = wnkernel.convert_state_dict(state, to=to)
    assert_same_state(by_key(load(tmp_path / f"out{target}")), by_key(expected))
    if target == ".safetensors":
        with safe_open(tmp_path / "out.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}  # transformers asks for it


def test_metadata_that_a_file_of_torch_has_no_place_for_is_named(tmp_path):
    save_file(trained().state_dict(), tmp_path / "in.safetensors", {"format": "pt", "step": "7"})
    said = convert(tmp_path / "in.safetensors", tmp_path / "out.pt", "folded")
    (warning,) = said["warnings"]
    assert "step" in warning
    assert "format" not in warning


def test_tied_tensors_stay_tied(tmp_path):
    torch.save(trained(tied=True).state_dict(), tmp_path / "in.pt")
    for to, keys in {
        "folded": ["weight"],
        "parametrized": [f"parametrizations.weight.original{k}" for k in (0, 1)],
    }.items():
        convert(tmp_path / "in.pt", tmp_path / f"{to}.pt", to)
        state = torch.load(tmp_path / f"{to}.pt")
        for key in keys:
            one, other = (state[f"heads.{k}.{key}"] for k in (0, 1))
            assert one.data_ptr() == other.data_ptr(), key
            assert one.data_ptr() != state["whole.bias"].data_ptr()


def test_tied_tensors_in_a_safetensors_file_are_written_one_by_one_with_a_warning(tmp_path):
    torch.save(trained(tied=True).state_dict(), tmp_path / "in.pt")
    said = convert(tmp_path / "in.pt", tmp_path / "out.safetensors", "folded")
    (warning,) = said["warnings"]
    assert "heads.0.weight and heads.1.weight" in warning
    state = load_file(tmp_path / "out.safetensors")
    assert torch.equal(state["heads.0.weight"], state["heads.1.weight"])


def test_eps_is_that_of_the_layers(tmp_path):
    layer = wnkernel.weight_norm(nn.Linear(4, 3), eps=100.0)
    torch.save(layer.state_dict(), tmp_path / "in.pt")
    convert(tmp_path / "in.pt", tmp_path / "out.pt", "folded", "--eps", "100")
    assert torch.equal(torch.load(tmp_path / "out.pt")["weight"], layer.weight)
    convert(tmp_path / "in.pt", tmp_path / "no.pt", "folded")
    assert not torch.equal(torch.load(tmp_path / "no.pt")["weight"], layer.weight)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_mixture_of_layouts_and_a_weight_in_two_that_agree(tmp_path, suffix):
    legacy = trained("legacy").state_dict()
    mixed = wnkernel.convert_state_dict(legacy, to="parametrized")
    mixed |= {key: legacy[key].clone() for key in ("pre.weight_g", "pre.weight_v")}
    save(mixed, tmp_path / f"in{suffix}")
    said = convert(tmp_path / f"in{suffix}", tmp_path / f"out{suffix}", "legacy")
    kinds = {c["weight"]: c["from"] for c in said["changes"]}
    assert kinds.pop("pre.weight") == "parametrized+legacy"
    assert set(kinds.values()) == {"parametrized"}
    assert_same_state(by_key(load(tmp_path / f"out{suffix}")), by_key(legacy))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_dry_run_shows_what_would_change_and_writes_nothing(tmp_path, suffix):
    state = trained("legacy").state_dict()
    save(state, tmp_path / f"in{suffix}")
    before = files_in(tmp_path)
    for out in ([], [tmp_path / f"out{suffix}"]):
        result = invoke("convert", tmp_path / f"in{suffix}", *out, "--to", "folded", "--dry-run")
        assert result.exit_code == 0
        rows = [line.split("│")[1:5] for line in result.stdout.splitlines() if "│" in line]
        table = {weight.strip(): [cell.strip() for cell in rest] for weight, *rest in rows}
        for (weight, shape), dim in zip(WEIGHTS.items(), DIMS, strict=True):
            text = "none" if dim is None else str(dim)
            assert table[weight] == ["legacy -> folded", "x".join(map(str, shape)), text]
        assert len(table) == len(WEIGHTS)
        assert "nothing was written" in result.stdout
    assert files_in(tmp_path) == before


def test_what_a_dry_run_says_in_json_is_what_is_done(tmp_path):
    torch.save(trained().state_dict(), tmp_path / "in.pt")
    dry = convert(tmp_path / "in.pt", tmp_path / "out.pt", "folded", "--dry-run")
    assert not (tmp_path / "out.pt").exists()
    done = convert(tmp_path / "in.pt", tmp_path / "out.pt", "folded")
    assert (dry.pop("dry_run"), done.pop("dry_run")) == (True, False)
    assert (dry.pop("written"), done.pop("written")) == ([], [str(tmp_path / "out.pt")])
    assert dry == done


def test_what_will_be_in_a_safetensors_file_is_computed_once_for_all_of_a_kind(
    tmp_path, monkeypatch
):
    computed, weight_norm = [], wnkernel.functional.weight_norm

    def counted(v, *rest, **named):
        computed.append(v.device.type)
        return weight_norm(v, *rest, **named)

    monkeypatch.setattr(wnkernel.functional, "weight_norm", counted)
    state = {}
    for k in range(20):
        state |= {f"{k}.weight_g": torch.ones(4, 1), f"{k}.weight_v": torch.ones(4, 3)}
    save_file(state, tmp_path / "in.safetensors")
    convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "folded")
    assert 0 < computed.count("meta") < 5
    assert computed.count("cpu") >= 20


def test_quiet_says_nothing_and_otherwise_a_few_lines_do(tmp_path):
    torch.save(trained().state_dict(), tmp_path / "in.pt")
    quiet = invoke("convert", tmp_path / "in.pt", tmp_path / "a.pt", "--to", "folded", "-q")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")
    loud = invoke("convert", tmp_path / "in.pt", tmp_path / "b.pt", "--to", "folded")
    assert loud.stdout.splitlines() == [
        "7 weight norms, legacy -> folded",
        f"wrote {tmp_path / 'b.pt'}",
    ]
    torch.save({"weight_g": torch.ones(2, 1), "weight_v": torch.ones(2, 3)}, tmp_path / "one.pt")
    one = invoke("convert", tmp_path / "one.pt", "--to", "folded", "--dry-run")
    assert "1 weight norm, legacy -> folded" in one.stdout


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("to", ["legacy", "parametrized", "folded"])
def test_a_file_without_weight_norm_is_said_to_be_one(tmp_path, suffix, to):
    state = Net("folded").state_dict() | {"level_g": torch.ones(1), "level_v": torch.ones(3)}
    save(state, tmp_path / f"in{suffix}")
    before = files_in(tmp_path)
    line = fails(1, "convert", tmp_path / f"in{suffix}", tmp_path / f"out{suffix}", "--to", to)
    assert "no weight norm" in line
    assert line.endswith("weight_g may be half of one; nothing was written")
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("to", ["legacy", "parametrized"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_that_has_the_layout_already_is_said_to_have_it(tmp_path, suffix, to):
    state = trained(to).state_dict()
    save(state, tmp_path / f"in{suffix}")
    line = fails(1, "convert", tmp_path / f"in{suffix}", tmp_path / f"out{suffix}", "--to", to)
    assert f"(7) are {to} already" in line
    assert not (tmp_path / f"out{suffix}").exists()


def test_errors_in_json_are_an_object_too(tmp_path):
    result = invoke("convert", tmp_path / "no.pt", tmp_path / "o.pt", "--to", "legacy", "--json")
    assert result.exit_code == 3
    assert '"exit_code": 3' in result.stdout
    assert str(tmp_path / "no.pt") in result.stdout
