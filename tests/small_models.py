"""Models of the transformers package with random weights and so few channels that a pass through
all of them takes a second. Most passes are those of benchmarks/model_zoo.py."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.model_zoo import BY_NAME

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

    config: str
    input_shape: tuple[int, ...]
    forward: Callable[[Any, Tensor], Tensor]
    layers: int
    """How many weights are normed."""
    options: dict[str, Any] = field(default_factory=dict)


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
}

all_models = pytest.mark.parametrize("name", MODELS)


def build(name: str, kind: str = "torch") -> nn.Module:
    """The model in eval mode, with torch's parametrization (``"torch"``) or legacy hook
    (``"legacy"``); g is moved off the norms of v, or ``w = v`` would do."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    small = MODELS[name]
    package = transformers
    if name == "SeamlessM4TCodeHifiGan":
        from transformers.models.seamless_m4t import modeling_seamless_m4t as package
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        if kind == "legacy":  # what the models fall back to without the parametrization
            patch.delattr(nn.utils.parametrizations, "weight_norm")
            warnings.simplefilter("ignore", FutureWarning)
        model = getattr(package, name)(getattr(transformers, small.config)(**small.options)).eval()
        if hasattr(model, "apply_weight_norm"):
            model.apply_weight_norm()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith((".original0", "_g")):
                parameter.mul_(0.8 + 0.4 * torch.rand(parameter.shape))
    return model


def run(model: nn.Module, name: str) -> Tensor:
    """The output for an input that is the same in every call."""
    small = MODELS[name]
    return small.forward(model, ramp(*small.input_shape))


def ramp(*shape: int) -> Tensor:
    """Values between -1 and 1 that are the same in every call."""
    return torch.linspace(-40, 40, torch.Size(shape).numel()).sin().view(shape)
