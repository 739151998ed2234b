"""A small HiFi-GAN in the ways in which users have one: for the tests with other people's
libraries."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import wnkernel

from . import small_models
from .groups import REUSE

NAME = "SpeechT5HifiGan"
LAYERS = small_models.MODELS[NAME].layers

FORMS: dict[str, Callable[[nn.Module], object]] = {
    "alone": lambda model: None,
    **{f"fused, {reuse}": partial(wnkernel.fuse, reuse=reuse) for reuse in REUSE},
}
"""What is done to a model after ``convert``."""

all_forms = pytest.mark.parametrize("form", FORMS)
from_both_kinds = pytest.mark.parametrize("kind", ["torch", "legacy"])


def build(kind: str = "torch") -> nn.Module:
    """With torch's own weight norm; the same in every call."""
    torch.manual_seed(0)
    return small_models.build(NAME, kind)


_built = functools.cache(build)


def of_torch(kind: str = "torch") -> nn.Module:
    """:func:`build`, sooner: by a copy, which only the parametrization allows."""
    return build(kind) if kind == "legacy" else copy.deepcopy(_built())


def vocoder(form: str = "alone", kind: str = "torch") -> nn.Module:
    """With ours, in one of :data:`FORMS`; the same in every call."""
    model = of_torch(kind)
    assert len(wnkernel.convert(model)) == LAYERS
    FORMS[form](model)
    return model


def spectrogram(examples: int = 1) -> Tensor:
    """An input that is the same in every call."""
    return small_models.ramp(examples, 7, 6)


def batch(step: int = 0) -> Tensor:
    """The input of a training step."""
    return spectrogram(2) + 0.1 * step


def loss_of(y: Tensor) -> Tensor:
    return y.square().mean()


def assert_same_parameters(got: nn.Module, want: nn.Module) -> None:
    """The same bits, by position, since the names of legacy layers differ."""
    for a, b in zip(got.parameters(), want.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate without what it keeps for a process: its first Accelerator decides for all."""
    state = pytest.importorskip("accelerate.state", reason="Accelerate is not installed")

    def reset() -> None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()

    reset()
    yield
    reset()
