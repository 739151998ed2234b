"""Checkpoints of models that others wrote, with random weights, saved by torch and transformers."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

import wnkernel
from wnkernel import convert_state_dict
from wnkernel.backends import BACKENDS

from ..checkpoints import KINDS, LAYOUTS, all_layouts, g_and_v, unchanged
from ..conftest import only
from ..layers import APPLY, assert_same_state
from ..small_models import BUILT_NORMED, MODELS, all_models, build, embed_of_chat_tts, ramp, run

OUTPUT = 1e-5
"""How far an output may be off, relative to the largest value in it. Roundings of w in the last
place move these models by up to 1e-6 of it."""


def is_close(got: Tensor, want: Tensor) -> bool:
    return bool((got - want).abs().max() <= OUTPUT * want.abs().max())


def seeded(name: str, seed: int, kind: str = "torch") -> nn.Module:
    torch.manual_seed(seed)
    return build(name, kind)


def of_torch(name: str, layout: str, seed: int) -> nn.Module:
    """A model whose ``state_dict`` has the layout, by torch's own functions alone."""
    model = seeded(name, seed, KINDS[layout])
    for module in list(model.modules()) if layout == "folded" else []:
        if hasattr(module, "weight_g"):
            nn.utils.remove_weight_norm(module)
    return model


def saved(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Through a file of ``torch.save``."""
    file = io.BytesIO()
    torch.save(dict(state_dict), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def train_one_step(model: nn.Module, name: str) -> Tensor:
    """Towards a ramp. The step is so large that 1 % more of a gradient shows in the output."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    y = run(model, name).flatten()
    loss = (y / y.detach().abs().max() - ramp(y.numel())).square().mean()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)  # or rounding grows in some models
    optimizer.step()
    return loss.detach()


def normed(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if parametrize.is_parametrized(m, "weight")]


@pytest.fixture(params=[k for k in BACKENDS if k in ("eager", "cpu") or torch.cuda.is_available()])
def on(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend that runs on the device of the tests; Triton's not in the interpreter, which
    would take a minute."""
    yield from only(request.param)


@all_layouts
@all_models
def test_from_torchs_file_through_a_training_step_and_back(name, layout, on):
    """Bit for bit on ``eager``, which has torch's own kernels. A folded weight becomes g and v,
    and ``g * v / ||v||`` rounds, so it comes back up to rounding on every backend."""
    exact = on == "eager"

    # torch saves, ours loads
    theirs = of_torch(name, layout, seed=1)
    checkpoint = saved(theirs.state_dict())
    model = seeded(name, 2, KINDS[layout])
    assert len(wnkernel.convert(model)) == MODELS[name].layers
    with unchanged(checkpoint):
        model.load_state_dict(checkpoint, strict=True)
    before = run(model, name).detach()
    assert_output(before, run(theirs, name), exact and layout != "folded")
    if layout != "folded":
        assert_same_tensors(convert_state_dict(model.state_dict(), layout), checkpoint)

    # torch's parametrization takes what ours saves, as it is, and both train
    twin = seeded(name, 3)
    twin.load_state_dict(saved(model.state_dict()), strict=True)
    losses = [train_one_step(m, name) for m in (model, twin)]
    torch.testing.assert_close(*losses)
    after = run(model, name).detach()
    assert_output(after, run(twin, name), exact and after.device.type == "cpu")
    assert not is_close(before, after)

    # ours saves, torch's own model loads
    back = saved(convert_state_dict(model.state_dict(), layout))
    theirs.load_state_dict(back, strict=True)
    assert_output(after, run(theirs, name), exact or layout == "folded")


def assert_output(got: Tensor, want: Tensor, exact: bool) -> None:
    assert torch.equal(got, want) if exact else is_close(got, want)


def assert_same_tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@all_models
def test_an_output_shows_an_error_in_any_g(name):
    """Or else the comparison above would prove little."""
    model = seeded(name, 1)
    want = run(model, name)
    with torch.no_grad():
        for layer in normed(model):
            g = layer.parametrizations.weight.original0
            right = g.clone()
            g.mul_(1.001)
            assert not is_close(run(model, name), want)
            g.copy_(right)
    assert is_close(run(model, name), want)


@all_models
def test_legacy_models_take_every_layout(name):
    original, target = seeded(name, 1), seeded(name, 2, "legacy")
    checkpoint, want = original.state_dict(), run(original, name)
    wnkernel.accept_any_layout(target)
    for layout in LAYOUTS:
        target.load_state_dict(seeded(name, 2, "legacy").state_dict())  # not what is loaded next
        target.load_state_dict(convert_state_dict(checkpoint, layout), strict=True)
        assert_output(run(target, name), want, exact=layout != "folded")
        if layout != "folded":
            assert_same_tensors(convert_state_dict(target.state_dict(), "parametrized"), checkpoint)


# transformers


@pytest.fixture(params=["converted", "fused"])
def ours(request):
    """Models of ours, built by name."""

    def make(name):
        model = seeded(name, 1)
        wnkernel.convert(model)
        if request.param == "fused":
            wnkernel.fuse(model)
        return model

    return make


def without_gaps(state_dict):
    return {key: t.contiguous() for key, t in state_dict.items()}


def assert_complete(info):
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("name", BUILT_NORMED)
def test_from_pretrained_of_save_pretrained(name, ours, tmp_path):
    model = ours(name)
    state = {key: t.clone() for key, t in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert_complete(info)
    assert_same_state(again.state_dict(), state)
    wnkernel.convert(again)
    assert len(wnkernel.fuse(again).layers) == MODELS[name].layers
    assert torch.equal(run(again, name), run(model, name))


def test_from_pretrained_of_a_model_that_is_made_without_weight_norm(ours, tmp_path):
    model = ours("SpeechT5HifiGan")
    folded = convert_state_dict(model.state_dict(), "folded")
    model.save_pretrained(tmp_path, state_dict=dict(folded))
    plain, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert_complete(info)
    assert not normed(plain)
    assert_same_tensors(plain.state_dict(), folded)
    assert torch.equal(run(plain, "SpeechT5HifiGan"), run(model, "SpeechT5HifiGan"))


@all_layouts
@pytest.mark.parametrize("name", BUILT_NORMED)
def test_from_pretrained_with_one_line_more(name, layout, tmp_path: Path):
    """transformers 5 runs no load hooks; docs/checkpoints.md has this line."""
    original = seeded(name, 1)
    state, file = original.state_dict(), tmp_path / "model.safetensors"
    save_file(without_gaps(convert_state_dict(state, layout)), file)
    like = type(original)(original.config)
    checkpoint = convert_state_dict(load_file(file), like=like)
    model, info = type(original).from_pretrained(
        None, config=original.config, state_dict=checkpoint, output_loading_info=True
    )
    assert_complete(info)
    assert_output(run(model, name), run(original, name), exact=layout != "folded")
    if layout != "folded":
        assert_same_state(model.state_dict(), state)


# ChatTTS: five heads, saved with the parametrized keys, wanted by code with the legacy ones


class Heads(nn.Module):
    """As ChatTTS has them, for where it is not installed."""

    def __init__(self, kind: str, width: int, codes: int, texts: int) -> None:
        super().__init__()
        self.head_text = self.head(width, texts, kind)
        self.head_code = nn.ModuleList(self.head(width, codes, kind) for _ in range(4))

    def head(self, width: int, out: int, kind: str) -> nn.Module:
        return APPLY[kind](nn.Linear(width, out, bias=False), "weight", 0)


HEADS = {"ChatTTS": embed_of_chat_tts, "imitation": Heads}


@pytest.mark.parametrize("source", HEADS)
def test_the_heads_of_chat_tts(source):
    """Its own numbers of tokens; an eighth of its width, which is 768."""

    def heads_of(kind: str) -> nn.Module:
        return HEADS[source](kind, 96, 626, 21178)

    def outputs(model: nn.Module) -> list[Tensor]:
        x = torch.linspace(-1, 1, 192).view(2, 96)
        with wnkernel.use_backend("eager"):
            return [head(x) for head in (model.head_text, *model.head_code)]

    torchs = heads_of("torch")
    parametrized, want = saved(torchs.state_dict()), outputs(torchs)
    heads = ["head_text", *(f"head_code.{k}" for k in range(4))]
    keys = [key for head in heads for key in g_and_v(prefix=f"{head}.")]
    assert [key for key in parametrized if key.startswith("head")] == keys

    legacy = heads_of("legacy")
    with pytest.raises(RuntimeError, match=r'Missing key.*"head_text\.weight_g"'):
        legacy.load_state_dict(parametrized)
    with wnkernel.accept_any_layout(legacy):
        legacy.load_state_dict(parametrized, strict=True)
    assert all(map(torch.equal, outputs(legacy), want))
    heads_of("legacy").load_state_dict(convert_state_dict(parametrized, "legacy"), strict=True)

    model = heads_of("torch")
    assert len(wnkernel.convert(model)) == 5
    model.load_state_dict(saved(legacy.state_dict()), strict=True)
    assert all(map(torch.equal, outputs(model), want))
    assert_same_state(model.state_dict(), parametrized)
    again = heads_of("torch")
    again.load_state_dict(model.state_dict(), strict=True)
    assert all(map(torch.equal, outputs(again), want))
