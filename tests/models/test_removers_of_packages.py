"""What packages call to remove weight norm from their models, after the models became ours."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.weight_norm import WeightNorm as LegacyHook

import wnkernel

from .. import small_models
from ..groups import ramp
from ..layers import APPLY, weight_norm_kinds


class Vocoder(nn.Module):
    """Layers as they are arranged in HiFi-GAN and its many children."""

    def __init__(self, norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.conv_pre = norm(nn.Conv1d(3, 4, 3, padding=1))
        self.ups = nn.ModuleList([norm(nn.ConvTranspose1d(4, 4, 4, 2, 1)) for _ in range(2)])
        self.plain = nn.Conv1d(4, 4, 1)
        self.conv_post = norm(nn.Conv1d(4, 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_pre(x)
        for up in self.ups:
            x = up(x).relu()
        return self.conv_post(self.plain(x))


def bigvgan(model: Vocoder) -> None:
    """BigVGAN, IndexTTS: nothing may raise, or all that follows is left out."""
    try:
        for up in model.ups:
            nn.utils.remove_weight_norm(up)
        nn.utils.remove_weight_norm(model.conv_pre)
        nn.utils.remove_weight_norm(model.conv_post)
    except ValueError:
        pass


def parallel_wavegan(model: Vocoder) -> None:
    """ParallelWaveGAN, ESPnet: on every module."""

    def remove(module: nn.Module) -> None:
        try:
            nn.utils.remove_weight_norm(module)
        except ValueError:
            return

    model.apply(remove)


def stable_audio(model: Vocoder) -> None:
    """stable-audio-tools: while the modules are listed."""
    for module in model.modules():
        if hasattr(module, "weight") and module is not model.plain:
            nn.utils.remove_weight_norm(module)


def rvc(model: Vocoder) -> None:
    """RVC and so-vits-svc, before TorchScript: while the hooks are listed."""
    for layer in (*model.ups, model.conv_pre, model.conv_post):
        for hook in layer._forward_pre_hooks.values():
            if (
                hook.__module__ == "torch.nn.utils.weight_norm"
                and hook.__class__.__name__ == "WeightNorm"
            ):
                nn.utils.remove_weight_norm(layer)


def fish_speech(model: Vocoder) -> None:
    """Fish-speech, Coqui: torch's newer remover."""
    for layer in (*model.ups, model.conv_pre, model.conv_post):
        parametrize.remove_parametrizations(layer, tensor_name="weight")


def coqui(model: Vocoder) -> None:
    """Wherever there is one of the newer kind."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")


LOOPS = [bigvgan, parallel_wavegan, stable_audio, rvc, fish_speech, coqui]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("kind", ["ours", "torch", "legacy"])
def test_loops_of_packages(kind: str, loop: Callable, fused: bool) -> None:
    model = Vocoder(APPLY[kind])
    wnkernel.convert(model)
    if fused:
        wnkernel.fuse(model)
    want = model(ramp(1, 3, 8))
    loop(model)
    assert torch.equal(model(ramp(1, 3, 8)), want)
    model.load_state_dict(Vocoder(lambda layer: layer).state_dict())
    assert not any(parametrize.is_parametrized(module) for module in model.modules())


def test_what_packages_do_before_they_copy() -> None:
    """https://github.com/pytorch/pytorch/issues/28594: torch's legacy hook keeps a weight with a
    history, which deepcopy refuses. So the weight is deleted, and the hook computes it anew."""
    model = Vocoder(wnkernel.weight_norm)
    want = model(ramp(1, 3, 8))

    def hooks() -> list[tuple[nn.Module, LegacyHook]]:
        pairs = [(m, hook) for m in model.modules() for hook in m._forward_pre_hooks.values()]
        return [(m, hook) for m, hook in pairs if isinstance(hook, LegacyHook)]

    assert len(hooks()) > 2
    for module, hook in hooks():
        delattr(module, hook.name)
    copied = copy.deepcopy(model)
    for module, hook in hooks():
        hook(module, None)
    for got in (model, copied):
        assert torch.equal(got(ramp(1, 3, 8)), want)
    wnkernel.fold(copied)
    plain = copied.conv_pre
    del plain.weight
    with pytest.raises(AttributeError):
        del plain.weight


OF_TRANSFORMERS = [
    "SpeechT5HifiGan",
    "UnivNetModel",
    "DacModel",
    "VitsModel",
    "FastSpeech2ConformerHifiGan",
    "SeamlessM4TCodeHifiGan",
]


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
@pytest.mark.parametrize("kind", ["torch", "legacy"])
def test_the_removers_of_transformers(name: str, kind: str) -> None:
    model = small_models.build(name, kind)
    part = model
    if name == "VitsModel":  # the method of its other parts looks for an attribute that they lack
        part = model.decoder
        part.apply_weight_norm()
    assert wnkernel.convert(model)
    want = small_models.run(model, name)
    part.remove_weight_norm()
    for module in part.modules():
        assert not weight_norm_kinds(module)
        assert len(module._forward_pre_hooks) == 0
        assert not type(module).__name__.startswith("Parametrized")
    assert torch.equal(small_models.run(model, name), want)
