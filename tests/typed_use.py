"""What a type checker makes of a user's code: every public name, with the types that it promises.

``make lint`` checks this file; nothing runs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import wnkernel
from wnkernel import WeightNorm, WeightNormGroup, functional


class Vocoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = wnkernel.weight_norm(nn.Conv1d(80, 512, 7))
        self.last = wnkernel.weight_norm(nn.Linear(512, 1), name="weight", dim=None, eps=1e-6)

    def forward(self, mel: Tensor) -> Tensor:
        y: Tensor = self.last(self.first(mel).mT)
        return y


def functions(v: Tensor, g: Tensor, dim: int | None) -> None:
    assert_type(functional.weight_norm(v, g), Tensor)
    assert_type(functional.weight_norm(v, g, dim, eps=1e-6, out_dtype=torch.float16), Tensor)
    assert_type(functional.weight_norms([v], (g,), [dim], eps=[0.0]), list[Tensor])
    assert_type(functional.norm_except_dim(v, dim), Tensor)


def layers(convolution: nn.Conv1d) -> None:
    """The type of a layer stays what it was."""
    assert_type(wnkernel.weight_norm(convolution), nn.Conv1d)
    assert_type(Vocoder().last, nn.Linear)
    assert_type(wnkernel.init_weight_(convolution, nn.init.kaiming_normal_), nn.Conv1d)
    assert_type(wnkernel.remove_weight_norm(convolution, name="weight"), nn.Conv1d)


def parametrization(v: Tensor, g: Tensor) -> None:
    norm = WeightNorm(dim=None, eps=1e-6)
    assert_type(norm.dim, int)
    assert_type(norm.eps, float)
    assert_type(norm.forward(g, v), Tensor)
    assert_type(norm.right_inverse(v), tuple[Tensor, Tensor])


def models(model: Vocoder, batch: tuple[Tensor, ...]) -> None:
    assert_type(wnkernel.convert(model), list[str])
    assert_type(wnkernel.data_dependent_init_(model, batch), list[str])
    assert_type(wnkernel.fold(model), list[str])
    with wnkernel.patch_torch():
        Vocoder()


def groups(model: Vocoder) -> Iterator[Tensor]:
    group = wnkernel.fuse(model, reuse="version", bucket_cap_mb=25, autocast=True)
    assert_type(group, WeightNormGroup)
    assert_type(WeightNormGroup.of(model), WeightNormGroup)
    assert_type(group.layers, list[str])
    assert_type(group.memory(), dict[str, int])
    with group.scope():
        yield model(torch.zeros(1, 80, 100))
    group.refresh()
    group.remove()


def checkpoints(model: Vocoder, path: str) -> None:
    state_dict = wnkernel.convert_state_dict(torch.load(path), "folded", like=model, eps=1e-6)
    assert_type(state_dict, dict[str, Any])
    wnkernel.convert_state_dict(state_dict, like=model.state_dict())
    with wnkernel.accept_any_layout(model) as handle:
        assert_type(handle.weights, list[str])
    handle.remove()


def machine() -> None:
    backend: AbstractContextManager[None] = wnkernel.use_backend("eager")
    with backend:
        facts = wnkernel.info()
    assert_type(facts["load_error"], str)
    assert_type(facts["backends"], dict[str, list[str]])
    assert_type(wnkernel.cpu_buffers(), dict[str, int])
    wnkernel.release_cpu_buffers()
    assert_type(wnkernel.__version__, str)
