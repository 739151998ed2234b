"""``wnkernel convert`` on training checkpoints: state dicts below other things, which are kept."""

from __future__ import annotations

import pickle
import sys
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import wnkernel

from ..command_line import Net, convert, fails, invoke, on_the_cpu, outputs, trained
from ..layers import assert_same_state

__all__ = ["on_the_cpu"]


def step(net, optimizer):
    """A training step, in which every parameter gets another gradient."""
    random = torch.Generator().manual_seed(3)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=random)
    optimizer.step()


def lightning(net, optimizer):
    """What pytorch_lightning's Trainer saves, in plain types."""
    return {
        "epoch": 3,
        "global_step": 1200,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": OrderedDict((f"net.{k}", t) for k, t in net.state_dict().items()),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"last_epoch": 3, "_last_lr": [1e-3]}],
        "hyper_parameters": {"lr": 1e-3, "kernel_sizes": (3, 5), "name": None},
        "rng": [torch.get_rng_state()],
    }


def without(content, *path):
    """A copy in which one entry is None."""
    first, *rest = path
    copied = dict(content)
    copied[first] = without(content[first], *rest) if rest else None
    return copied


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.mark.parametrize(
    ("source", "target"), [("legacy", "parametrized"), ("parametrized", "legacy")]
)
def test_a_lightning_checkpoint_goes_on_training_with_torchs_other_weight_norm(
    tmp_path, source, target
):
    net, other = trained(source), Net(target).eval()
    optimizer, other_optimizer = (torch.optim.Adam(n.parameters()) for n in (net, other))
    step(net, optimizer)
    content = lightning(net, optimizer)
    torch.save(content, tmp_path / "last.ckpt")
    said = convert(tmp_path / "last.ckpt", tmp_path / "out.ckpt", target)
    assert {c["where"] for c in said["changes"]} == {"state_dict"}
    assert said["changes"][0]["weight"] == "net.pre.weight"
    assert said["warnings"] == []

    got = torch.load(tmp_path / "out.ckpt", weights_only=True)
    assert_same(without(got, "state_dict"), without(content, "state_dict"))
    state = {key.removeprefix("net."): t for key, t in got["state_dict"].items()}
    other.load_state_dict(state, strict=True)
    other_optimizer.load_state_dict(got["optimizer_states"][0])
    for one in (net, optimizer), (other, other_optimizer):
        step(*one)
    assert torch.equal(outputs(other), outputs(net))


def test_a_generator_in_a_file_without_an_ending_as_hifi_gan_saves_it(tmp_path):
    net, other = trained("legacy"), Net("parametrized").eval()
    torch.save({"generator": net.state_dict()}, tmp_path / "g_02500000")
    convert(tmp_path / "g_02500000", tmp_path / "g_parametrized", "parametrized")
    got = torch.load(tmp_path / "g_parametrized", weights_only=True)
    assert list(got) == ["generator"]
    other.load_state_dict(got["generator"], strict=True)
    assert torch.equal(outputs(other), outputs(net))
    (tmp_path / "g_02500000").rename(tmp_path / "g.model")
    convert(tmp_path / "g.model", tmp_path / "other.model", "parametrized")
    again = torch.load(tmp_path / "other.model", weights_only=True)
    assert_same_state(again["generator"], got["generator"])


def test_every_state_dict_in_dicts_lists_and_tuples_is_converted(tmp_path):
    legacy = trained("legacy").state_dict()
    content = {
        "mpd": legacy,
        "ema": [legacy, (dict(legacy), "text")],
        "model": {"encoder": {"deep": dict(legacy)}, 7: "number"},
        "steps": torch.tensor(5),
    }
    torch.save(content, tmp_path / "in.pt")
    said = convert(tmp_path / "in.pt", tmp_path / "out.pt", "parametrized")
    parts = list(dict.fromkeys(c["where"] for c in said["changes"]))
    assert parts == ["mpd", "ema[1][0]", "model.encoder.deep"]  # ema[0] is mpd itself
    got = torch.load(tmp_path / "out.pt", weights_only=True)
    expected = wnkernel.convert_state_dict(legacy, to="parametrized")
    for found in (got["mpd"], got["ema"][0], got["ema"][1][0], got["model"]["encoder"]["deep"]):
        assert_same_state(found, expected)
    assert got["ema"][0] is got["mpd"]
    assert got["ema"][1][1] == "text"
    assert type(got["ema"][1]) is tuple
    assert got["model"][7] == "number"
    assert got["steps"] == 5


def test_tensors_in_several_parts_of_a_file_stay_tied(tmp_path):
    legacy = trained("legacy").state_dict()
    torch.save({"model": legacy, "ema": dict(legacy)}, tmp_path / "in.pt")
    convert(tmp_path / "in.pt", tmp_path / "out.pt", "folded")
    got = torch.load(tmp_path / "out.pt", weights_only=True)
    addresses = {key: t.data_ptr() for key, t in got["model"].items()}
    assert addresses == {key: t.data_ptr() for key, t in got["ema"].items()}
    assert len(set(addresses.values())) == len(addresses)


def test_folding_warns_that_optimizer_state_does_not_fit_and_keeps_it(tmp_path):
    net = trained("parametrized")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    step(net, optimizer)
    torch.save({"model": net.state_dict(), "optim_g": optimizer.state_dict()}, tmp_path / "in.pt")
    said = convert(tmp_path / "in.pt", tmp_path / "out.pt", "folded")
    (warning,) = said["warnings"]
    count = len(list(net.parameters()))
    assert warning.startswith(f"optim_g: kept as it is, but its {count} parameters")
    got = torch.load(tmp_path / "out.pt", weights_only=True)
    assert_same(got["optim_g"], optimizer.state_dict())
    with pytest.raises(ValueError, match="doesn't match the size"):
        torch.optim.SGD(Net("folded").parameters(), lr=0.1).load_state_dict(got["optim_g"])
    shown = invoke("convert", tmp_path / "in.pt", tmp_path / "b.pt", "--to", "folded", "-q")
    assert shown.stderr == f"wnkernel: warning: {warning}\n"


def test_a_warning_where_optimizer_state_goes_by_names(tmp_path):
    net = trained("legacy")
    named = {"state": {}, "param_groups": [{"params": [n for n, _ in net.named_parameters()]}]}
    torch.save({"model": net.state_dict(), "opt": named}, tmp_path / "in.pt")
    said = convert(tmp_path / "in.pt", tmp_path / "out.pt", "parametrized")
    assert said["warnings"] == ["opt: kept as it is, with the names that the parameters had before"]


def test_optimizer_state_that_looks_like_a_weight_norm_is_left_alone(tmp_path):
    pair = {"weight_g": torch.ones(3, 1), "weight_v": torch.ones(3, 2)}
    optimizer = {"state": {0: dict(pair)}, "param_groups": [{"params": [0]}]}
    torch.save({"model": pair, "opt": optimizer}, tmp_path / "in.pt")
    convert(tmp_path / "in.pt", tmp_path / "out.pt", "folded")
    got = torch.load(tmp_path / "out.pt", weights_only=True)
    assert list(got["model"]) == ["weight"]
    assert_same(got["opt"], optimizer)


def test_what_is_more_than_tensors_does_not_go_into_a_safetensors_file(tmp_path):
    net = trained("legacy")
    for content, name in (
        ({"generator": net.state_dict()}, "'generator'"),
        (net.state_dict() | {"epoch": 3}, "'epoch'"),
        (net.state_dict() | {7: torch.ones(2)}, "(7)"),
        ([net.state_dict()], "other things"),
    ):
        torch.save(content, tmp_path / "in.pt")
        line = fails(4, "convert", tmp_path / "in.pt", tmp_path / "o.safetensors", "--to", "folded")
        assert name in line
        assert not (tmp_path / "o.safetensors").exists()


@pytest.mark.parametrize(
    ("key", "shown"), [("\ud800", r"\ud800: "), ("__metadata__", "__metadata__: ")]
)
def test_keys_that_a_safetensors_file_cannot_have(tmp_path, key, shown):
    torch.save(trained("legacy").state_dict() | {key: torch.ones(2)}, tmp_path / "in.pt")
    line = fails(4, "convert", tmp_path / "in.pt", tmp_path / "o.safetensors", "--to", "folded")
    assert f"{shown}a safetensors file cannot have such a key" in line
    assert not (tmp_path / "o.safetensors").exists()
    convert(tmp_path / "in.pt", tmp_path / "o.pt", "folded")
    assert key in torch.load(tmp_path / "o.pt", weights_only=True)


def test_keys_that_are_no_text_beside_a_weight_norm(tmp_path):
    pair = {"a.weight_g": torch.ones(3, 1), "a.weight_v": torch.ones(3, 2)}
    optimizer = torch.optim.Adam(nn.Linear(1, 1).parameters()).state_dict()
    content = pair | {3: torch.zeros(2), ("x", 1): "text", "opt": optimizer}
    torch.save(content, tmp_path / "in.pt")
    for to in ("folded", "parametrized"):
        convert(tmp_path / "in.pt", tmp_path / f"{to}.pt", to)
        got = torch.load(tmp_path / f"{to}.pt", weights_only=True)
        expected = wnkernel.convert_state_dict(pair, to=to)
        assert_same(got, expected | {k: v for k, v in content.items() if k not in pair})


def test_a_dict_inside_itself_is_kept(tmp_path):
    content = {"model": trained("legacy").state_dict()}
    content["self"] = content
    torch.save(content, tmp_path / "in.pt")
    convert(tmp_path / "in.pt", tmp_path / "out.pt", "folded")
    got = torch.load(tmp_path / "out.pt", weights_only=True)
    assert got["self"] is got
    assert "pre.weight" in got["model"]


def test_nesting_without_an_end_is_an_error_of_the_file(tmp_path):
    content = {"weight_g": torch.ones(3, 1), "weight_v": torch.ones(3, 2)}
    for _ in range(3000):
        content = [content]
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        # C's pickler has a limit of its own
        in_python = SimpleNamespace(__name__="pickle", Pickler=pickle._Pickler, dumps=pickle.dumps)
        torch.save(content, tmp_path / "in.pt", pickle_module=in_python)
    finally:
        sys.setrecursionlimit(limit)
    line = fails(3, "convert", tmp_path / "in.pt", tmp_path / "out.pt", "--to", "folded")
    assert "nested too deeply" in line
