"""Activation checkpointing of both kinds over a fused model: the same gradients, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import wnkernel

from ..groups import Computed, assert_same_tensors, both_modes, gradients, twins


class Deep(nn.Module):
    """Blocks of two layers; ``wrap(module, x)`` calls a block or a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                wnkernel.weight_norm(nn.Conv1d(4, 4, 3, padding=1)),
                nn.Tanh(),
                wnkernel.weight_norm(nn.Conv1d(4, 4, 3, padding=1), dim=dim),
                nn.Tanh(),
            )
            for dim in (0, 1, None)
        )
        self.calls: Sequence[Callable[[nn.Module, Tensor], Tensor]] = (_call, _call)

    def forward(self, x: Tensor) -> Tensor:
        block_call, layer_call = self.calls
        for block in self.blocks:
            if layer_call is _call:
                x = block_call(block, x)
            else:
                for module in block:
                    x = layer_call(module, x)
        return x


def _call(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


@both_modes
@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("what", ["blocks", "layers", "whole"])
def test_checkpointing(route, computed: Computed, what, use_reentrant, early_stop, reuse):
    def wrapped(module: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(module, x, use_reentrant=use_reentrant)

    model, twin, _ = twins(reuse, build=Deep)
    if what != "whole":
        model.calls = (wrapped, _call) if what == "blocks" else (_call, wrapped)
    run = wrapped if what == "whole" else _call
    x = torch.randn(2, 4, 16)
    with set_checkpoint_early_stop(early_stop):
        for step in range(2):
            computed.take()
            y = run(model, x.clone().requires_grad_())
            alive = reuse == "version" and step > 0  # the launches of the first step
            assert computed.take() == ([] if alive else [6], 0)
            y.square().sum().backward()
            if what == "layers":  # grouped in the forward, alone in the recomputation
                assert computed.take() == ([], 6)
            elif reuse == "version" and not use_reentrant:
                assert computed.take() == ([], 0)
            else:
                launches = [6] if what == "whole" else [2, 2, 2]
                assert computed.take() == ([] if alive else launches, 0)
            twin(x.clone().requires_grad_()).square().sum().backward()
    assert_same_tensors(gradients(model), gradients(twin))
