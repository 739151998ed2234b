"""Wrappers that answer for the layer that they hold, ``parametrizations`` included: the weights are
the layer's, once, under the name that it has in the model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import wnkernel

from ..checkpoints import saved
from ..layers import APPLY


class Forwarding(nn.Module):
    """What PEFT's ``ModulesToSaveWrapper`` and FSDP's first version do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.held = module

    def forward(self, x: Tensor) -> Tensor:
        return self.held(x)

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.held, name)


WRAPPERS = {
    "held": Forwarding,
    "_orig_mod": lambda module: torch.compile(module, backend="eager"),
}
pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.parametrize("held", WRAPPERS),
]
both = pytest.mark.parametrize("kind", ["ours", "torch"])


def model(kind: str, held: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(WRAPPERS[held](APPLY[kind](nn.Linear(4, 4))), APPLY[kind](nn.Linear(4, 3)))


def names(held: str) -> list[str]:
    return [f"0.{held}.weight", "1.weight"]


def x() -> Tensor:
    return torch.linspace(-1, 1, 8).view(2, 4)


@both
def test_fold(kind, held):
    m = model(kind, held)
    want = m(x())
    assert wnkernel.fold(m) == names(held)
    torch.testing.assert_close(m(x()), want)
    assert set(m.state_dict()) == {f"0.{held}.weight", f"0.{held}.bias", "1.weight", "1.bias"}


def test_convert_and_fuse(held):
    m = model("torch", held)
    want = m(x())
    assert wnkernel.convert(m) == names(held)
    torch.testing.assert_close(m(x()), want)
    group = wnkernel.fuse(m)
    assert list(group.layers) == names(held)
    torch.testing.assert_close(m(x()), want)


def test_accept_any_layout(held):
    m = model("torch", held)
    handle = wnkernel.accept_any_layout(m)
    assert handle.weights == names(held)
    checkpoint = saved(nn.Linear(4, 4), "legacy")
    m.load_state_dict({f"0.{held}.{key}": t for key, t in checkpoint.items()}, strict=False)
    weights = m[0].parametrizations.weight
    assert torch.equal(weights.original0, checkpoint["weight_g"])


@both
def test_state_dicts_like_the_model(kind, held):
    m, folded = model(kind, held), model(kind, held)
    wnkernel.fold(folded)
    converted = wnkernel.convert_state_dict(folded.state_dict(), like=m)
    assert set(converted) == set(m.state_dict())


def test_data_dependent_init(held):
    m = model("ours", held)
    assert wnkernel.data_dependent_init_(m, torch.randn(9, 4)) == names(held)
