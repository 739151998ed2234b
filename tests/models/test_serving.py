"""A decoder that is called again and again for every chunk of audio: how often its weights are
computed, in each of the ways of docs/serving.md, and that the audio is the same."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import wnkernel
from wnkernel import WeightNormGroup

from ..groups import Computed
from ..vocoders import LAYERS, of_torch, spectrogram, vocoder

CALLS = 4
"""Of the decoder, for a chunk."""

all_modes = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])


def folded() -> nn.Module:
    model = vocoder()
    assert len(wnkernel.fold(model)) == LAYERS
    return model


def scope_of(model: nn.Module) -> AbstractContextManager[None]:
    return WeightNormGroup.of(model).scope()


Scope = Callable[[nn.Module], AbstractContextManager[None]]

WAYS: dict[str, tuple[Callable[[], nn.Module], Scope, list[int]]] = {
    "torch's": (of_torch, nullcontext, [CALLS * LAYERS] * 2),
    "ours": (vocoder, nullcontext, [CALLS * LAYERS] * 2),
    "fused": (lambda: vocoder("fused, forward"), nullcontext, [CALLS, CALLS]),
    "fused, a scope for a chunk": (lambda: vocoder("fused, forward"), scope_of, [1, 1]),
    "fused, version": (lambda: vocoder("fused, version"), nullcontext, [1, 0]),
    "folded": (folded, nullcontext, [0, 0]),
}
"""How a model is made, what surrounds a chunk, and how many kernels are launched for the weights of
the first and of the second chunk."""


def chunk(model: nn.Module, scope: Scope, calls: int = CALLS) -> Tensor:
    with scope(model):
        return torch.stack([model(spectrogram() + 0.01 * call) for call in range(calls)])


def launches(run: Callable[[], Tensor]) -> int:
    """How many kernels for weight norms are launched, torch's or ours."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    names = [event.name for event in profiler.events()]
    return sum(n == "aten::_weight_norm_interface" or n.startswith("wnkernel::") for n in names)


@all_modes
@pytest.mark.parametrize("way", WAYS)
def test_launches(compiled_backend: str, way: str, mode: Scope) -> None:
    build, scope, expected = WAYS[way]
    model = build()
    with mode():
        assert [launches(lambda: chunk(model, scope)) for _ in range(2)] == expected


@all_modes
@pytest.mark.parametrize("way", WAYS)
def test_the_audio_is_the_same(way: str, mode: Scope) -> None:
    build, scope, _ = WAYS[way]
    model, calls = build(), 3
    with mode():
        want = chunk(vocoder(), nullcontext, calls)
        for _ in range(2):
            got = chunk(model, scope, calls)
            if way == "torch's":
                torch.testing.assert_close(got, want)
            else:
                assert torch.equal(got, want)


@all_modes
def test_new_weights_are_served_at_once(mode: Scope) -> None:
    """A server that loads another voice between two chunks."""
    model, voice = vocoder("fused, version"), vocoder()
    with torch.no_grad():
        for p in voice.parameters():
            p.mul_(1.1)
    with mode():
        chunk(model, nullcontext, 2)
        model.load_state_dict(voice.state_dict())
        assert torch.equal(chunk(model, nullcontext, 2), chunk(voice, nullcontext, 2))


def test_every_thread_computes_for_itself(computed: Computed) -> None:
    """What a pool of threads has to pay for ``reuse="version"``, also in memory; a folded model is
    the same to all of them."""
    model = vocoder("fused, version")
    results: list[Tensor] = []

    def serve() -> None:
        with torch.inference_mode():
            results.extend(chunk(model, nullcontext, 2) for _ in range(2))

    for _ in range(3):
        thread = threading.Thread(target=serve)
        thread.start()
        thread.join()
    assert computed.take() == ([LAYERS] * 3, 0)
    with torch.inference_mode():
        want = chunk(vocoder(), nullcontext, 2)
    assert all(torch.equal(got, want) for got in results)
    assert len(results) == 6
