"""Real models with random weights, built offline, and a short differentiable pass through each.

Default configurations; inputs so short that the weights are a visible part of a step. Nearest
neighbour look-ups and rounded durations are left out of the passes: there a difference in the last
bit makes the output jump, and a pass that cannot be compared cannot be verified. What stays runs
every weight-normed layer.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Pass = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Entry:
    """A model of the transformers package, by the names of its classes."""

    model: str
    config: str
    input_shape: tuple[int, ...]
    forward: Pass
    apply_weight_norm: bool  # Whether the model waits for a call of its method of that name.


def _univnet(model: Any, features: Tensor) -> Tensor:
    noise = _noise((1, features.shape[1], model.config.model_in_channels), features)
    return model(input_features=features, noise_sequence=noise).waveforms


def _dac(model: Any, audio: Tensor) -> Tensor:
    residual = model.encoder(audio)
    coded = torch.zeros_like(residual)
    for quantizer in model.quantizer.quantizers:  # without the look-up between its projections
        step = quantizer.out_proj(quantizer.in_proj(residual))
        coded, residual = coded + step, residual - step
    return model.decoder(coded)


def _vits(model: Any, spectrogram: Tensor) -> Tensor:
    """The path of a training step: posterior encoder, decoder and flow."""
    torch.manual_seed(0)  # the posterior samples
    mask = spectrogram.new_ones(1, 1, spectrogram.shape[-1])
    latents, *_ = model.posterior_encoder(spectrogram, mask)
    return torch.cat([model.decoder(latents).flatten(), model.flow(latents, mask).flatten()])


ZOO = (
    Entry("SpeechT5HifiGan", "SpeechT5HifiGanConfig", (1, 16, 80), lambda m, x: m(x), True),
    Entry("UnivNetModel", "UnivNetConfig", (1, 16, 100), _univnet, True),
    Entry(
        "EncodecModel", "EncodecConfig", (1, 1, 4000), lambda m, x: m.decoder(m.encoder(x)), False
    ),
    Entry("DacModel", "DacConfig", (1, 1, 2000), _dac, True),
    Entry("VitsModel", "VitsConfig", (1, 513, 16), _vits, False),
    Entry("Wav2Vec2Model", "Wav2Vec2Config", (1, 4000), lambda m, x: m(x).last_hidden_state, False),
)

BY_NAME = {entry.model: entry for entry in ZOO}


def available() -> bool:
    """Whether transformers is installed."""
    return importlib.util.find_spec("transformers") is not None


def build(name: str, device: torch.device) -> nn.Module:
    """The model in eval mode, gradients on, normed by torch's parametrization.

    Its g is moved off the norms of v: weights for which ``w = v`` would prove nothing.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    entry = BY_NAME[name]
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = getattr(transformers, entry.model)(getattr(transformers, entry.config)()).eval()
    if entry.apply_weight_norm:
        model.apply_weight_norm()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(".original0"):
                parameter.mul_(0.8 + 0.4 * torch.rand(parameter.shape, generator=random))
    return model.to(device)


def model_input(name: str, device: torch.device) -> Tensor:
    """A random input of the entry's shape."""
    return _noise(BY_NAME[name].input_shape, torch.empty(0, device=device))


def _noise(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(like)
