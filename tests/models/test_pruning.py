"""``torch.nn.utils.prune`` on g and v by their legacy names: as on torch's legacy layers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import wnkernel

from ..groups import ramp
from ..layers import legacy_weight_norm, weight_norm_kinds


def pair() -> tuple[nn.Module, nn.Module]:
    """Ours with legacy names, and torch's legacy layer."""
    plain = nn.Conv1d(4, 6, 3)
    ours = copy.deepcopy(plain)
    with wnkernel.patch_torch():
        nn.utils.weight_norm(ours)
    torchs = legacy_weight_norm(plain)
    ours.load_state_dict(torchs.state_dict())
    return ours, torchs


def mask_like(t: Tensor) -> Tensor:
    return (torch.arange(t.numel()) % 3 > 0).view(t.shape).to(t.dtype)


METHODS: dict[str, Callable[[nn.Module, str], Any]] = {
    "identity": prune.identity,
    "l1_unstructured": lambda m, name: prune.l1_unstructured(m, name, amount=0.5),
    "random_unstructured": lambda m, name: prune.random_unstructured(m, name, amount=2),
    "ln_structured": lambda m, name: prune.ln_structured(m, name, amount=0.4, n=2, dim=0),
    "random_structured": lambda m, name: prune.random_structured(m, name, amount=0.4, dim=0),
    "custom_from_mask": lambda m, name: prune.custom_from_mask(
        m, name, mask_like(getattr(m, name))
    ),
    "global_unstructured": lambda m, name: prune.global_unstructured(
        [(m, name), (m, "bias")], prune.L1Unstructured, amount=0.3
    ),
}
all_methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
both_originals = pytest.mark.parametrize("name", ["weight_v", "weight_g"])


def apply(method: Callable[[nn.Module, str], Any], module: nn.Module, name: str) -> None:
    torch.manual_seed(3)
    method(module, name)


def assert_alike(ours: nn.Module, torchs: nn.Module) -> None:
    y, want = ours(ramp(2, 4, 8)), torchs(ramp(2, 4, 8))
    torch.testing.assert_close(y, want, equal_nan=True)
    torch.testing.assert_close(ours.weight, torchs.weight, equal_nan=True)
    for name in ("weight_g", "weight_v"):
        assert torch.equal(getattr(ours, name), getattr(torchs, name))
        assert hasattr(ours, f"{name}_mask") == hasattr(torchs, f"{name}_mask")
        assert prune.is_pruned(ours) == prune.is_pruned(torchs)
    names = {"weight_g": "parametrizations.weight.original0"}
    names |= {"weight_v": "parametrizations.weight.original1"}
    assert {*ours.state_dict()} == {names.get(key, key) for key in torchs.state_dict()}
    for key, p in torchs.named_parameters():
        assert isinstance(ours.get_parameter(names.get(key, key)), nn.Parameter)
        assert torch.equal(ours.get_parameter(names.get(key, key)), p)


@both_originals
@all_methods
def test_pruned_once_and_again(method: Callable, name: str) -> None:
    ours, torchs = pair()
    for _ in range(2):
        for module in (ours, torchs):
            apply(method, module, name)
        assert_alike(ours, torchs)
    gradients = []
    for module in (ours, torchs):
        module(ramp(2, 4, 8)).sum().backward()
        gradients.append(getattr(module, f"{name}_orig").grad)
    torch.testing.assert_close(*gradients, equal_nan=True)
    for module in (ours, torchs):
        prune.remove(module, name)
        if hasattr(module, "bias_mask"):
            prune.remove(module, "bias")
        module(ramp(2, 4, 8))
    assert_alike(ours, torchs)
    assert not prune.is_pruned(ours)
    assert isinstance(ours.parametrizations.weight._parameters["original1"], nn.Parameter)
    wnkernel.remove_weight_norm(ours)
    torch.testing.assert_close(ours.weight, torchs.weight, equal_nan=True)


def test_both_originals_pruned() -> None:
    ours, torchs = pair()
    for module in (ours, torchs):
        apply(METHODS["l1_unstructured"], module, "weight_v")
        apply(METHODS["custom_from_mask"], module, "weight_g")
        module(ramp(2, 4, 8))
    assert_alike(ours, torchs)
    for module in (ours, torchs):
        prune.remove(module, "weight_g")
        prune.remove(module, "weight_v")
    assert_alike(ours, torchs)


class Failing(prune.BasePruningMethod):
    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        raise ArithmeticError("no mask")


@both_originals
def test_a_mask_that_cannot_be_computed_changes_nothing(name: str) -> None:
    ours, torchs = pair()
    before = {key: t.clone() for key, t in ours.state_dict().items()}
    for module in (ours, torchs):
        with pytest.raises(ArithmeticError, match="no mask"):
            Failing.apply(module, name)
    assert_alike(ours, torchs)
    assert {*before} == {*ours.state_dict()}
    for key, t in ours.state_dict().items():
        assert torch.equal(t, before[key])


@pytest.mark.parametrize("reuse", ["forward", "version"])
def test_in_a_group(reuse: str) -> None:
    ours, torchs = pair()
    model = nn.Sequential(ours, wnkernel.weight_norm(nn.Conv1d(6, 4, 3)))
    wnkernel.fuse(model, reuse=reuse)
    model(ramp(2, 4, 8))
    for module in (ours, torchs):
        apply(METHODS["l1_unstructured"], module, "weight_v")
    for _ in range(2):
        torch.testing.assert_close(model(ramp(2, 4, 8)), model[1](torchs(ramp(2, 4, 8))))
        with torch.no_grad():
            for module in (ours, torchs):
                module.weight_v_orig.mul_(2).add_(0.1)
                module(ramp(2, 4, 8))  # torch's mask comes into effect one forward late
    for module in (ours, torchs):
        prune.remove(module, "weight_v")
    torch.testing.assert_close(model(ramp(2, 4, 8)), model[1](torchs(ramp(2, 4, 8))))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied: Callable) -> None:
    ours, torchs = pair()
    for module in (ours, torchs):
        apply(METHODS["l1_unstructured"], module, "weight_v")
    with torch.no_grad():  # deepcopy refuses a tensor with a history, and torch's mask leaves one
        ours(ramp(2, 4, 8)), torchs(ramp(2, 4, 8))
    other = copied(ours)
    assert_alike(other, torchs)
    prune.remove(other, "weight_v")
    assert prune.is_pruned(ours)
    assert_alike(ours, torchs)


REMOVERS: list[tuple[Callable[[nn.Module], Any], type[Exception]]] = [
    (wnkernel.remove_weight_norm, RuntimeError),
    (nn.utils.remove_weight_norm, RuntimeError),
    (wnkernel.fold, ValueError),
]


@both_originals
@pytest.mark.parametrize(("remove", "error"), REMOVERS)
def test_a_pruned_weight_norm_is_not_removed(remove: Callable, error: type, name: str) -> None:
    ours, torchs = pair()
    for module in (ours, torchs):
        apply(METHODS["ln_structured"], module, name)
    with pytest.raises(error, match=rf"weight.*'{name}' is pruned; call torch.nn.utils.prune.rem"):
        remove(ours)
    assert_alike(ours, torchs)
    prune.remove(ours, name)
    remove(ours)
    assert not weight_norm_kinds(ours)
    torch.testing.assert_close(ours.weight, torchs.weight, equal_nan=True)


def test_by_the_name_in_the_parametrization() -> None:
    """On the list itself, as with torch's parametrization."""
    ours, torchs = pair()
    prune.l1_unstructured(ours.parametrizations.weight, "original1", amount=0.5)
    prune.l1_unstructured(torchs, "weight_v", amount=0.5)
    torch.testing.assert_close(ours(ramp(2, 4, 8)), torchs(ramp(2, 4, 8)))
    prune.remove(ours.parametrizations.weight, "original1")
    torch.testing.assert_close(ours(ramp(2, 4, 8)), torchs(ramp(2, 4, 8)))
