"""Models of transformers, encodec and ChatTTS with random weights and so few channels that a pass
through all of them takes a second. Most passes are those of benchmarks/models.py."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.models import BY_NAME

VOCODER = {
    "model_in_dim": 6,
    "upsample_initial_channel": 16,
    "upsample_rates": [2, 2],
    "upsample_kernel_sizes": [4, 4],
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 3]],
}
SPEECH = {
    "vocab_size": 10,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": [8, 8],
    "conv_stride": [5, 2],
    "conv_kernel": [10, 3],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}


@dataclass(frozen=True)
class Small:
    """A model by the names of its classes, and what to run it on."""

    config: str | None
    """None for a model that takes its options itself."""
    input_shape: tuple[int, ...]
    forward: Callable[[Any, Tensor], Tensor]
    layers: int
    """How many weights are normed."""
    options: dict[str, Any] = field(default_factory=dict)
    gain: float = 1.0
    """The mean of g; where it is too large, rounding grows from layer to layer."""


MODELS: dict[str, Small] = {
    "SpeechT5HifiGan": Small(
        "SpeechT5HifiGanConfig", (1, 7, 6), BY_NAME["SpeechT5HifiGan"].forward, 12, VOCODER
    ),
    "FastSpeech2ConformerHifiGan": Small(
        "FastSpeech2ConformerHifiGanConfig",
        (1, 7, 6),
        BY_NAME["SpeechT5HifiGan"].forward,
        12,
        VOCODER,
    ),
    "SeamlessM4TCodeHifiGan": Small(
        "SeamlessM4TConfig",
        (1, 12, 7),
        lambda model, x: model.hifi_gan(x),
        12,
        {
            **VOCODER,
            "unit_hifi_gan_vocab_size": 10,
            "unit_embed_dim": 6,
            "lang_embed_dim": 3,
            "spkr_embed_dim": 3,
            "vocoder_num_langs": 2,
            "vocoder_num_spkrs": 2,
            "variance_predictor_kernel_size": 3,
        },
    ),
    "UnivNetModel": Small(
        "UnivNetConfig",
        (1, 5, 6),
        lambda model, x: model(input_features=x, noise_sequence=ramp(1, 5, 8)).waveforms,
        10,
        {
            "model_in_channels": 8,
            "model_hidden_channels": 8,
            "num_mel_bins": 6,
            "resblock_kernel_sizes": [3],
            "resblock_stride_sizes": [4],
            "resblock_dilation_sizes": [[1, 3]],
            "kernel_predictor_num_blocks": 1,
            "kernel_predictor_hidden_channels": 8,
        },
    ),
    "EncodecModel": Small(
        "EncodecConfig",
        (1, 1, 120),
        BY_NAME["EncodecModel"].forward,
        20,
        {
            "num_filters": 4,
            "upsampling_ratios": [2, 2],
            "codebook_size": 8,
            "hidden_size": 8,
            "num_lstm_layers": 1,
            "target_bandwidths": [1.5],
        },
    ),
    "DacModel": Small(
        "DacConfig",
        (1, 1, 120),
        BY_NAME["DacModel"].forward,
        36,
        {
            "encoder_hidden_size": 4,
            "downsampling_ratios": [2, 2],
            "decoder_hidden_size": 8,
            "n_codebooks": 2,
            "codebook_size": 8,
            "codebook_dim": 3,
        },
        gain=0.65,
    ),
    "VitsModel": Small(
        "VitsConfig",
        (1, 9, 8),
        BY_NAME["VitsModel"].forward,
        12,
        {
            **VOCODER,
            "vocab_size": 10,
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "ffn_dim": 8,
            "flow_size": 8,
            "spectrogram_bins": 9,
            "prior_encoder_num_flows": 2,
            "prior_encoder_num_wavenet_layers": 2,
            "posterior_encoder_num_wavenet_layers": 2,
            "duration_predictor_filter_channels": 8,
            "depth_separable_num_layers": 1,
            "duration_predictor_num_flows": 2,
        },
    ),
    "Wav2Vec2Model": Small("Wav2Vec2Config", (1, 400), BY_NAME["Wav2Vec2Model"].forward, 1, SPEECH),
    "HubertModel": Small("HubertConfig", (1, 400), BY_NAME["Wav2Vec2Model"].forward, 1, SPEECH),
    "WavLMModel": Small("WavLMConfig", (1, 400), BY_NAME["Wav2Vec2Model"].forward, 1, SPEECH),
    "encodec": Small(
        None,
        (1, 1, 120),
        BY_NAME["EncodecModel"].forward,
        20,
        {"n_filters": 4, "dimension": 8, "ratios": [2, 2], "lstm": 1},
    ),
}
BUILT_NORMED = ["EncodecModel", "VitsModel", "Wav2Vec2Model", "HubertModel", "WavLMModel"]
"""Those of transformers whose constructor applies weight norm; ``from_pretrained`` makes the others
without."""

all_models = pytest.mark.parametrize("name", MODELS)


def build(name: str, kind: str = "torch") -> nn.Module:
    """The model in eval mode, with torch's parametrization (``"torch"``) or legacy hook
    (``"legacy"``). Each g is so large that an error in any of them shows in the output; those that
    the models start with let all but a few layers vanish, and ``w = v`` would do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, of its legacy weight norm
        model = (encodec if name == "encodec" else of_transformers)(name, kind).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith((".original0", "_g")):
                parameter.uniform_(0.8, 1.2).mul_(MODELS[name].gain)
    return model


def of_transformers(name: str, kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    transformers.logging.set_verbosity_error()
    small = MODELS[name]
    package = transformers
    if name == "SeamlessM4TCodeHifiGan":
        from transformers.models.seamless_m4t import modeling_seamless_m4t as package
    with pytest.MonkeyPatch.context() as patch:
        if kind == "legacy":  # what the models fall back to without the parametrization
            patch.delattr(nn.utils.parametrizations, "weight_norm")
        model = getattr(package, name)(getattr(transformers, small.config)(**small.options))
        if hasattr(model, "apply_weight_norm"):
            model.apply_weight_norm()
    return model


def encodec(name: str, kind: str) -> nn.Module:
    """The encoder and the decoder. The package calls torch's legacy function, and needs torchaudio
    to be imported, but not to be run: it is not asked for, since it has to fit torch's build."""
    folder("encodec")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchaudio", ModuleType("torchaudio"))
        modules = importlib.import_module("encodec.modules")
        if kind == "torch":
            patch.setattr(modules.conv, "weight_norm", nn.utils.parametrizations.weight_norm)
        options = MODELS[name].options
        parts = modules.SEANetEncoder(**options), modules.SEANetDecoder(**options)
    return nn.ModuleDict(dict(zip(("encoder", "decoder"), parts, strict=True)))


def embed_of_chat_tts(kind: str, *sizes: int) -> nn.Module:
    """ChatTTS's module with the five heads, from its file: the package imports far more. It calls
    torch's parametrization; with an older torch, users put the legacy function in its place."""
    file = folder("ChatTTS") / "model" / "embed.py"
    spec = importlib.util.spec_from_file_location("ChatTTS.model.embed", file)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        utils = ModuleType("ChatTTS.utils")
        utils.load_safetensors = None
        patch.setitem(sys.modules, utils.__name__, utils)
        spec.loader.exec_module(module)
        warnings.simplefilter("ignore", FutureWarning)
        if kind == "legacy":
            module.weight_norm = nn.utils.weight_norm
        return module.Embed(*sizes)


def folder(package: str) -> Path:
    """Where a package is installed."""
    if (spec := importlib.util.find_spec(package)) is None:
        pytest.skip(f"{package} is not installed (pip install --no-deps encodec einops ChatTTS)")
    return Path(spec.origin).parent


def run(model: nn.Module, name: str) -> Tensor:
    """The output for an input that is the same in every call."""
    small = MODELS[name]
    return small.forward(model, ramp(*small.input_shape))


def ramp(*shape: int) -> Tensor:
    """Values between -1 and 1 that are the same in every call."""
    return torch.linspace(-40, 40, torch.Size(shape).numel()).sin().view(shape)
