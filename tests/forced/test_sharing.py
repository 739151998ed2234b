"""Layers that share their v, and exported programs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import wnkernel

from . import edm2


class Tied(nn.Module):
    """Two layers with one v."""

    def __init__(self) -> None:
        super().__init__()
        self.first = wnkernel.forced_weight_norm(nn.Linear(4, 4, bias=False))
        self.second = wnkernel.forced_weight_norm(nn.Linear(4, 4, bias=False))
        self.second.parametrizations.weight.original = self.first.parametrizations.weight.original

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def test_layers_that_share_v_are_computed_alone_in_a_group(backend: str) -> None:
    """One launch would write v while it reads it for the other layer."""
    model = Tied()
    v = model.first.parametrizations.weight.original
    wnkernel.fuse(model)
    before, version = v.detach().clone(), v._version
    with torch.no_grad():
        model(torch.randn(2, 4))
    assert v._version == version + 2
    torch.testing.assert_close(v.detach(), edm2.normalized(edm2.normalized(before)))


def test_fold_refuses_layers_that_share_v(backend: str) -> None:
    """v can become the w of one layer only. The model is unchanged."""
    model = Tied().eval()
    x = torch.randn(2, 4)
    want = model(x)
    with pytest.raises(
        ValueError, match=r"^model: expected .* 'second.weight' .* shares its param"
    ):
        wnkernel.fold(model)
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_adds_eps(backend: str, strict: bool) -> None:
    layer = wnkernel.forced_weight_norm(nn.Linear(4, 3, bias=False), eps=0.1).eval()
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(0.1)
    x = torch.randn(2, 4)
    program = torch.export.export(layer, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), layer(x))
