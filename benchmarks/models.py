"""Case "models": real models with random weights, each weight computed alone, by three kinds of
weight norm.

The configurations are the defaults. Inputs are so short that the weights are a visible part of a
step. The passes leave out nearest neighbour look-ups and rounded durations, where a difference in
the last bit makes the output jump, so that it could not be verified. The rest still runs every
weight-normed layer.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import verify
from .contenders import BY_CASE, COPY, TORCH, Pass, copy_of, random_grads, stripped
from .environment import Environment
from .plan import Job, Plan
from .results import STEP, Result, of_list, rows
from .timing import Contender, device_sampler, measure

OUTPUT_L2 = 1e-4  # The allowed relative difference of outputs: roundings through tens of layers.
LEARNING_RATE = 1e-6  # So small that the models stay the same during the timing.


@dataclass(frozen=True)
class Entry:
    """A model of the transformers package, named by its classes."""

    model: str
    config: str
    input_shape: tuple[int, ...]
    forward: Callable[[Any, Tensor], Tensor]
    apply_weight_norm: bool  # Whether the model's method of this name must be called.


def _univnet(model: Any, features: Tensor) -> Tensor:
    noise = _noise((1, features.shape[1], model.config.model_in_channels), features)
    return model(input_features=features, noise_sequence=noise).waveforms


def _dac(model: Any, audio: Tensor) -> Tensor:
    residual = model.encoder(audio)
    coded = torch.zeros_like(residual)
    for quantizer in model.quantizer.quantizers:  # leaves out the look-up between the projections
        step = quantizer.out_proj(quantizer.in_proj(residual))
        coded, residual = coded + step, residual - step
    return model.decoder(coded)


def _vits(model: Any, spectrogram: Tensor) -> Tensor:
    """Run the path of a training step: posterior encoder, decoder and flow."""
    torch.manual_seed(0)  # seeds the samples of the posterior
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
    """Return the model in eval mode with gradients on, normed by torch's parametrization."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    entry = BY_NAME[name]
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = getattr(transformers, entry.model)(getattr(transformers, entry.config)()).eval()
    if entry.apply_weight_norm:
        model.apply_weight_norm()
    return model.to(device)


def model_input(name: str, device: torch.device) -> Tensor:
    """Return a random input of the entry's shape."""
    return _noise(BY_NAME[name].input_shape, torch.empty(0, device=device))


def _noise(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(like)


def jobs(plan: Plan, where: Environment) -> list[Job]:
    """Make one job per model."""
    names = plan.models or BY_NAME
    return [Job(f"model {name}", lambda n=name: freed(run(n, plan, where))) for name in names]


def freed(results: list[Result]) -> list[Result]:
    """Pass results on after their models are freed: modules are in reference cycles."""
    gc.collect()
    return results


def run(name: str, plan: Plan, where: Environment) -> list[Result]:
    """Verify, then time, the weight norms alone and a training step, with all kinds interleaved."""
    normed = stripped(build(name, where.device))
    models = {who: normed(who) for who in BY_CASE["models"]}
    del normed
    vs = [layer.v for layer in models[TORCH].layers]
    about = of_list("models", name, [v.numel() for v in vs])
    grads = random_grads(vs)
    alone = {who: Pass(normed, grads) for who, normed in models.items()}
    checker = verify.Checker(name, where)
    errors = {who: checker.check_pass(who, one) for who, one in alone.items()}
    del checker
    x = model_input(name, where.device)
    forward = BY_NAME[name].forward
    with torch.no_grad():
        want = forward(models[TORCH].model, x)
        for who, one in models.items():
            verify.check_same(f"{who}, {name}", forward(one.model, x), want, OUTPUT_L2)
    sample = device_sampler(where.device)
    timed: dict[str, Contender] = {**alone, COPY: copy_of(vs)}
    stats = measure(timed, sample, plan.model_budget_s)
    out = rows(about, where, stats, errors=errors)
    del timed, alone, grads

    steps: dict[str, Contender] = {}
    for who, one in models.items():
        steps[who] = training_step(one.model, functools.partial(forward, one.model, x))
    return out + rows(about.of_phase(STEP), where, measure(steps, sample, plan.step_budget_s))


def training_step(model: nn.Module, forward: Callable[[], Tensor]) -> Contender:
    """Return a training step: forward, mean of squares, backward, SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

    def step() -> None:
        forward().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
