"""Parameters of weight norms in groups of an optimizer, chosen by their names: g without weight
decay, and matrices for optimizers that take nothing else. docs/recipes.md shows both."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import wnkernel
from wnkernel.census import census

from .. import small_models
from ..small_models import all_models
from ..vocoders import FORMS, all_forms, assert_same_parameters, batch, loss_of, vocoder

G_NAMES = ("original0", "weight_g")
"""How the name of a g ends, with torch's two weight norms and ours."""


def by_name(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """g and all other parameters."""
    named = list(model.named_parameters())
    g = [p for name, p in named if name.endswith(G_NAMES)]
    return g, [p for name, p in named if not name.endswith(G_NAMES)]


def ids(tensors: list[Tensor]) -> list[int]:
    return sorted(map(id, tensors))


@pytest.mark.parametrize("kind", ["torch", "legacy"])
@all_models
def test_names_find_g_and_nothing_else(name: str, kind: str) -> None:
    """Before a conversion and after it: the same tensors."""
    model = small_models.build(name, kind)
    expected = ids([e.originals()[0] for e in census(model)])
    assert ids(by_name(model)[0]) == expected
    wnkernel.convert(model)
    assert ids(by_name(model)[0]) == expected


@pytest.mark.parametrize("fused", [False, True])
@all_forms
def test_decay_of_v_alone_leaves_the_weights(form: str, fused: bool) -> None:
    """A step without any gradient: v becomes shorter, and w depends on its direction only."""
    model = vocoder(form)
    g, rest = by_name(model)
    before = model(batch()).detach(), [p.detach().clone() for p in g], rest[1].detach().clone()
    biases = [p for p in rest if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in rest if p.ndim > 1]},
            {"params": [*g, *biases], "weight_decay": 0.0},
        ],
        lr=0.1,
        weight_decay=0.5,
        fused=fused,
    )
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(map(torch.equal, g, before[1]))
    torch.testing.assert_close(rest[1], before[2] * (1 - 0.1 * 0.5))
    torch.testing.assert_close(model(batch()), before[0])


# Muon


class Heads(nn.Module):
    """Linear layers, as in the heads of ChatTTS and DINO."""

    def __init__(self, norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.first = norm(nn.Linear(6, 12))
        self.last = norm(nn.Linear(12, 8, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def heads(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return Heads(norm)


@pytest.fixture
def muon() -> type[torch.optim.Optimizer]:
    found = getattr(torch.optim, "Muon", None)
    if found is None:
        pytest.skip("torch.optim.Muon came with torch 2.9")
    return found


def train(model: nn.Module, muon: type[torch.optim.Optimizer]) -> None:
    """Muon for v of linear layers, AdamW for g and biases."""
    _, rest = by_name(model)
    matrices = [p for p in rest if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers = muon(matrices, lr=0.05, weight_decay=0.1), torch.optim.AdamW(others, lr=0.05)
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(model(small_models.ramp(5, 6) + step)).backward()
        for optimizer in optimizers:
            optimizer.step()


@all_forms
def test_muon(muon: type[torch.optim.Optimizer], form: str) -> None:
    model, twin = heads(wnkernel.weight_norm), heads(wnkernel.weight_norm)
    before = [p.detach().clone() for p in model.parameters()]
    FORMS[form](model)
    train(model, muon), train(twin, muon)
    assert_same_parameters(model, twin)
    assert not any(map(torch.equal, model.parameters(), before))
    theirs = heads(nn.utils.parametrizations.weight_norm)
    train(theirs, muon)
    for a, b in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)  # it rounds to bfloat16
