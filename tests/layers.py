"""Layers to weight-normalise, and the three ways of doing so."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import wnkernel
from wnkernel.census import normed_in

# id -> (constructor, parameter, input shape)
LAYERS: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(5, 4), "weight", (2, 5)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3), "weight", (2, 4, 8)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3), "weight", (2, 4, 5, 5)),
    "Conv2d grouped": (lambda: nn.Conv2d(4, 4, 3, groups=4), "weight", (2, 4, 5, 5)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2), "weight", (2, 2, 4, 4, 4)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3), "weight", (2, 4, 8)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3), "weight", (2, 4, 5, 5)),
    "LSTM ih": (lambda: nn.LSTM(4, 5), "weight_ih_l0", (3, 2, 4)),
    "LSTM hh": (lambda: nn.LSTM(4, 5), "weight_hh_l0", (3, 2, 4)),
    "GRU ih": (lambda: nn.GRU(4, 5), "weight_ih_l0", (3, 2, 4)),
    "GRU hh": (lambda: nn.GRU(4, 5), "weight_hh_l0", (3, 2, 4)),
}

DIMS = [0, 1, None, -1]

all_layers = pytest.mark.parametrize("layer", LAYERS)
all_dims = pytest.mark.parametrize("dim", DIMS)


def weight_norm_kinds(module: nn.Module) -> dict[str, str]:
    """The weight-normed parameters of a module, each with its kind."""
    return {name: normed.kind for name, normed in normed_in(module).items()}


class Doubled(nn.Module):
    """A parametrization to stack on a weight norm."""

    def forward(self, w: Tensor) -> Tensor:
        return 2 * w

    def right_inverse(self, w: Tensor) -> Tensor:
        return w / 2


def legacy_weight_norm(module: nn.Module, name: str = "weight", dim: int | None = 0) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module, name, dim)


APPLY = {
    "ours": wnkernel.weight_norm,
    "torch": nn.utils.parametrizations.weight_norm,
    "legacy": legacy_weight_norm,
}

all_kinds = pytest.mark.parametrize("kind", APPLY)


def twins(layer: str, dim: int | None, *kinds: str) -> tuple[nn.Module, ...]:
    """The same layer, weight-normed in several ways."""
    build, name, _ = LAYERS[layer]
    plain = build()
    return tuple(APPLY[kind](copy.deepcopy(plain), name, dim) for kind in kinds)


def originals(module: nn.Module, name: str = "weight") -> tuple[Tensor, Tensor]:
    """``(g, v)`` of a parametrized layer."""
    both = module.parametrizations[name]
    return both.original0, both.original1


def run(module: nn.Module, layer: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The output for an input that is the same in every call."""
    shape = LAYERS[layer][2]
    x = torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape).to(dtype)
    y = module(x)
    return y[0] if isinstance(y, tuple) else y


def assert_same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        assert torch.equal(a[key], b[key]), key


def assert_state_as_torchs(ours: dict[str, Tensor], torchs: dict[str, Tensor]) -> None:
    """The same up to the last bits of g: each has the norms that its own kernels divide by, and
    float64's are tests/models/test_restored_weights.py's to compare with."""
    assert list(ours) == list(torchs)
    for key, t in ours.items():
        assert t.dtype == torchs[key].dtype, key
        if key.endswith("original0"):
            torch.testing.assert_close(t, torchs[key], msg=lambda text, key=key: f"{key}: {text}")
        else:
            assert torch.equal(t, torchs[key]), key
