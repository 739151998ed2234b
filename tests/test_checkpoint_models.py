"""Checkpoints of models that others wrote, with random weights, saved by torch and transformers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize

import wnkernel
from wnkernel import convert_state_dict

from .checkpoints import LAYOUTS, all_layouts, g_and_v, unchanged
from .layers import APPLY, assert_same_state, legacy_weight_norm

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

VOCODER = {"model_in_dim": 8, "upsample_initial_channel": 32}
SPEECH = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": (8, 8),
    "conv_kernel": (3, 3),
    "conv_stride": (2, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 8,
}
# model -> (configuration, its values, how many weights are normed)
MODELS = {
    "SpeechT5HifiGan": ("SpeechT5HifiGanConfig", VOCODER, 78),
    "FastSpeech2ConformerHifiGan": ("FastSpeech2ConformerHifiGanConfig", VOCODER, 78),
    "SeamlessM4TCodeHifiGan": (
        "SeamlessM4TConfig",
        {
            "unit_hifi_gan_vocab_size": 10,
            "unit_embed_dim": 8,
            "lang_embed_dim": 4,
            "spkr_embed_dim": 4,
            "vocoder_num_langs": 2,
            "vocoder_num_spkrs": 2,
            "upsample_initial_channel": 32,
        },
        97,
    ),
    "UnivNetModel": (
        "UnivNetConfig",
        {
            "model_in_channels": 4,
            "model_hidden_channels": 4,
            "num_mel_bins": 8,
            "kernel_predictor_hidden_channels": 4,
        },
        44,
    ),
    "DacModel": (
        "DacConfig",
        {
            "encoder_hidden_size": 4,
            "decoder_hidden_size": 32,
            "hidden_size": 64,
            "n_codebooks": 2,
            "codebook_size": 16,
            "codebook_dim": 4,
            "downsampling_ratios": [2, 2],
            "upsampling_ratios": [2, 2],
        },
        36,
    ),
    "EncodecModel": (
        "EncodecConfig",
        {
            "num_filters": 4,
            "hidden_size": 16,
            "codebook_size": 16,
            "codebook_dim": 16,
            "upsampling_ratios": [2, 2],
        },
        20,
    ),
    "VitsModel": (
        "VitsConfig",
        {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "ffn_dim": 16,
            "flow_size": 16,
            "spectrogram_bins": 9,
            "upsample_initial_channel": 32,
            "posterior_encoder_num_wavenet_layers": 2,
            "prior_encoder_num_flows": 2,
            "duration_predictor_num_flows": 1,
            "duration_predictor_filter_channels": 16,
            "depth_separable_num_layers": 1,
            "vocab_size": 10,
        },
        20,
    ),
    "Wav2Vec2Model": ("Wav2Vec2Config", SPEECH, 1),
    "HubertModel": ("HubertConfig", SPEECH, 1),
    "WavLMModel": ("WavLMConfig", SPEECH, 1),
}
all_models = pytest.mark.parametrize("name", MODELS)
BUILT_NORMED = ["EncodecModel", "VitsModel", "Wav2Vec2Model", "HubertModel", "WavLMModel"]
"""Those whose constructor applies weight norm; ``from_pretrained`` makes the others without."""


def build(name: str, seed: int) -> nn.Module:
    """The model as torch's parametrization norms it; its g is not the norm of its v."""
    torch.manual_seed(seed)
    config, values, count = MODELS[name]
    transformers.logging.set_verbosity_error()
    model_class = getattr(transformers, name, None)
    if model_class is None:
        model_class = transformers.models.seamless_m4t.modeling_seamless_m4t.SeamlessM4TCodeHifiGan
    model = model_class(getattr(transformers, config)(**values)).eval()
    if name not in BUILT_NORMED:
        model.apply_weight_norm()
    with torch.no_grad():
        for layer in normed(model):
            g = layer.parametrizations.weight.original0
            g.mul_(0.5 + torch.rand(g.shape))
    assert len(normed(model)) == count
    return model


def normed(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if parametrize.is_parametrized(m, "weight")]


def resaved(model: nn.Module, layout: str) -> dict[str, torch.Tensor]:
    """What torch writes of a model in the layout. The model is changed."""
    for layer in normed(model) if layout != "parametrized" else []:
        norm = layer.parametrizations.weight
        g, v, dim = norm.original0.detach(), norm.original1.detach(), norm[0].dim
        parametrize.remove_parametrizations(layer, "weight")
        if layout == "legacy":
            legacy_weight_norm(layer, "weight", dim)
            with torch.no_grad():
                layer.weight_g.copy_(g)
                layer.weight_v.copy_(v)
    return model.state_dict()


@all_layouts
@all_models
def test_what_torch_saved_loads_into_ours_and_back(name, layout):
    original, torchs = build(name, 1), build(name, 2)
    before = {key: t.clone() for key, t in original.state_dict().items()}
    weights = [layer.weight.detach() for layer in normed(original)]
    checkpoint = resaved(original, layout)
    model = build(name, 3)
    wnkernel.convert(model)
    with unchanged(checkpoint):
        model.load_state_dict(checkpoint, strict=True)
    if layout == "folded":
        for layer, w in zip(normed(model), weights, strict=True):
            assert torch.equal(layer.parametrizations.weight.original1, w)
            torch.testing.assert_close(layer.weight, w)
    else:
        assert_same_state(model.state_dict(), before)
        with wnkernel.use_backend("eager"):
            for layer, w in zip(normed(model), weights, strict=True):
                assert torch.equal(layer.weight, w)

    torchs.load_state_dict(model.state_dict(), strict=True)
    assert_same_state(torchs.state_dict(), model.state_dict())
    back = convert_state_dict(model.state_dict(), layout)
    if layout == "folded":
        original.load_state_dict(back, strict=True)
        torch.testing.assert_close([layer.weight for layer in normed(model)], weights)
    else:
        assert back.keys() == checkpoint.keys()
        assert all(torch.equal(t, checkpoint[key]) for key, t in back.items())


@all_models
def test_legacy_models_take_every_layout(name):
    checkpoint = build(name, 1).state_dict()
    target = build(name, 2)
    resaved(target, "legacy")
    wnkernel.accept_any_layout(target)
    for layout in LAYOUTS:
        target.load_state_dict(convert_state_dict(checkpoint, layout), strict=True)
        if layout != "folded":
            assert_same_state(
                convert_state_dict(target.state_dict(), "parametrized"),
                {key: checkpoint[key] for key in convert_state_dict(target.state_dict())},
            )


# transformers


@pytest.fixture(params=["converted", "fused"])
def ours(request):
    """Models of ours, built by name."""

    def make(name):
        model = build(name, 1)
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
    assert len(wnkernel.fuse(again).layers) == len(normed(model))
    for one, other in zip(normed(again), normed(model), strict=True):
        assert torch.equal(one.weight, other.weight)


def test_from_pretrained_of_a_model_that_is_made_without_weight_norm(ours, tmp_path):
    model = ours("SpeechT5HifiGan")
    folded = convert_state_dict(model.state_dict(), "folded")
    model.save_pretrained(tmp_path, state_dict=dict(folded))
    plain, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert_complete(info)
    assert not normed(plain)
    for key, t in plain.state_dict().items():
        assert torch.equal(t, folded[key]), key


@all_layouts
@pytest.mark.parametrize("name", BUILT_NORMED)
def test_from_pretrained_with_one_line_more(name, layout, tmp_path: Path):
    """transformers 5 runs no load hooks; docs/checkpoints.md has this line."""
    original = build(name, 1)
    state, file = original.state_dict(), tmp_path / "model.safetensors"
    save_file(without_gaps(convert_state_dict(state, layout)), file)
    like = type(original)(original.config)
    checkpoint = convert_state_dict(load_file(file), like=like)
    model, info = type(original).from_pretrained(
        None, config=original.config, state_dict=checkpoint, output_loading_info=True
    )
    assert_complete(info)
    for one, other in zip(normed(model), normed(original), strict=True):
        torch.testing.assert_close(one.weight, other.weight)
    if layout != "folded":
        assert_same_state(model.state_dict(), state)


# ChatTTS: five heads, saved with the parametrized keys, wanted by code with the legacy ones


class Heads(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.head_text = self.head(21178, kind)
        self.head_code = nn.ModuleList(self.head(626, kind) for _ in range(4))

    def head(self, width: int, kind: str) -> nn.Module:
        return APPLY[kind](nn.Linear(768, width, bias=False), "weight", 0)


def test_the_heads_of_chat_tts():
    parametrized = Heads("torch").state_dict()
    heads = ["head_text", *(f"head_code.{k}" for k in range(4))]
    assert list(parametrized) == [key for head in heads for key in g_and_v(prefix=f"{head}.")]

    legacy = Heads("legacy")
    with pytest.raises(RuntimeError, match=r'Missing key.*"head_text\.weight_g"'):
        legacy.load_state_dict(parametrized)
    with wnkernel.accept_any_layout(legacy):
        legacy.load_state_dict(parametrized, strict=True)
    assert_same_state(convert_state_dict(legacy.state_dict()), parametrized)
    x = torch.randn(2, 768)
    torchs = Heads("torch")
    torchs.load_state_dict(parametrized)
    assert torch.equal(legacy.head_text(x), torchs.head_text(x))
    legacy.load_state_dict(convert_state_dict(parametrized, "legacy"), strict=True)

    model = Heads("ours")
    model.load_state_dict(legacy.state_dict(), strict=True)
    assert_same_state(model.state_dict(), parametrized)
    torchs.load_state_dict(model.state_dict(), strict=True)
    with wnkernel.use_backend("eager"):
        for one, other in zip(model.head_code, legacy.head_code, strict=True):
            assert torch.equal(one(x), other(x))
