"""What changes layers makes normal tensors of them, also where gradients are off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import wnkernel

from ..groups import ramp
from ..layers import APPLY


@contextmanager
def both() -> Iterator[None]:
    with torch.no_grad(), torch.inference_mode():
        yield


@contextmanager
def left_for_a_while() -> Iterator[None]:
    with torch.inference_mode(), torch.inference_mode(False), torch.no_grad():
        yield


GRADIENTS_OFF = [torch.inference_mode, torch.no_grad, both, left_for_a_while]
without_gradients = pytest.mark.parametrize("mode", GRADIENTS_OFF)


def modes() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def assert_trainable(model: nn.Module) -> None:
    """The parameters are as they would be without the mode."""
    assert modes() == (True, False)
    for name, p in model.named_parameters():
        assert isinstance(p, nn.Parameter), name
        assert p.is_leaf, name
        assert p.requires_grad, name
        assert not p.is_inference(), name
    model(ramp(2, 5)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.load_state_dict(model.state_dict())
    model.double()


def normed(kind: str) -> nn.Module:
    return nn.Sequential(APPLY[kind](nn.Linear(5, 4)), nn.ReLU(), APPLY[kind](nn.Linear(4, 5)))


def in_patch(layer: nn.Module) -> None:
    with wnkernel.patch_torch():
        nn.utils.weight_norm(layer)


APPLIED: dict[str, Callable[[nn.Module], Any]] = {
    "dim 0": wnkernel.weight_norm,
    "dim None": lambda layer: wnkernel.weight_norm(layer, dim=None),
    "patched": in_patch,
}


@pytest.mark.parametrize("apply", APPLIED.values(), ids=APPLIED)
@without_gradients
def test_weight_norm_is_put_on_with_the_weight_as_it_was(mode: Callable, apply: Callable) -> None:
    model = nn.Sequential(nn.Linear(5, 4))
    want = model[0].weight.detach().clone()
    with mode():
        before = modes()
        apply(model[0])
        assert modes() == before
        assert torch.equal(model[0].weight, want)
    assert_trainable(model)


@pytest.mark.parametrize("inside", [True, False])
def test_of_a_layer_that_was_built_in_inference_mode(inside: bool) -> None:
    with torch.inference_mode():
        layer = nn.Linear(5, 4)
        want = layer.weight.clone()
        if inside:
            wnkernel.weight_norm(layer)
    if not inside:
        wnkernel.weight_norm(layer)
    assert torch.equal(layer.weight, want)
    for p in layer.parametrizations.parameters():
        assert not p.is_inference()
        assert p.requires_grad
    layer.weight.square().sum().backward()


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "convert": wnkernel.convert,
    "convert and fuse": lambda model: (wnkernel.convert(model), wnkernel.fuse(model)),
    "fold": wnkernel.fold,
    "remove_weight_norm": lambda model: [
        wnkernel.remove_weight_norm(layer) for layer in (model[0], model[2])
    ],
    "init_weight_": lambda model: [
        wnkernel.init_weight_(layer, nn.init.ones_) for layer in (model[0], model[2])
    ],
}


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        pytest.param(kind, change, id=f"{kind}-{name}")
        for kind in APPLY
        for name, change in CHANGES.items()
        if name != "convert" or kind != "ours"  # there is nothing to convert
    ],
)
@without_gradients
def test_changes_of_a_model_of_any_kind(mode: Callable, kind: str, change: Callable) -> None:
    model = normed(kind)
    with mode():
        before = modes()
        change(model)
        assert modes() == before
        model(ramp(2, 5))
    assert_trainable(model)


OF_OURS: dict[str, Callable[[nn.Module], Any]] = {
    "fuse": wnkernel.fuse,
    "fold, fused": lambda model: (wnkernel.fuse(model), model(ramp(2, 5)), wnkernel.fold(model)),
    "torch's legacy remover": lambda model: nn.utils.remove_weight_norm(model[0]),
    "assigned tensor": lambda model: setattr(model[0], "weight", ramp(4, 5)),
    "assigned parameter": lambda model: setattr(model[0], "weight", nn.Parameter(ramp(4, 5))),
    "data_dependent_init_": lambda model: wnkernel.data_dependent_init_(model, ramp(9, 5).sin()),
    "data_dependent_init_, fused": lambda model: (
        wnkernel.fuse(model),
        wnkernel.data_dependent_init_(model, ramp(9, 5).sin()),
    ),
}


@pytest.mark.parametrize("change", OF_OURS.values(), ids=OF_OURS)
@without_gradients
def test_changes_of_our_layers(mode: Callable, change: Callable) -> None:
    model = normed("ours")
    with mode():
        before = modes()
        change(model)
        assert modes() == before
        model(ramp(2, 5))
    assert_trainable(model)


@without_gradients
def test_a_weight_of_another_shape(mode: Callable) -> None:
    layer = wnkernel.weight_norm(nn.Linear(5, 4, bias=False))
    with mode():
        layer.weight = ramp(6, 5)
    assert_trainable(layer)


SOURCES: dict[str, Callable[[nn.Module], nn.Module]] = {
    **APPLY,
    "plain": lambda layer: layer,
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("source", SOURCES)
@without_gradients
def test_state_dicts_are_loaded(mode: Callable, source: str, assign: bool) -> None:
    layer = SOURCES[source](nn.Linear(5, 4))
    state = {key: t.clone() for key, t in layer.state_dict().items()}
    model = nn.Sequential(wnkernel.weight_norm(nn.Linear(5, 4)))
    with mode():
        before = modes()
        model[0].load_state_dict(state, assign=assign)
        assert modes() == before
        torch.testing.assert_close(model[0].weight, layer.weight)
    assert_trainable(model)
    theirs = nn.Sequential(APPLY["legacy"](nn.Linear(5, 4)))
    with mode(), wnkernel.accept_any_layout(theirs):
        theirs[0].load_state_dict(state, assign=assign)
    assert_trainable(theirs)


def test_errors_leave_the_mode_as_it_was() -> None:
    for mode in GRADIENTS_OFF:
        with mode():
            before = modes()
            for call in (
                lambda: wnkernel.weight_norm(nn.Linear(5, 4), "nothing"),
                lambda: wnkernel.remove_weight_norm(nn.Linear(5, 4)),
                lambda: setattr(
                    wnkernel.weight_norm(nn.Linear(5, 4)), "weight", ramp(4, 5).double()
                ),
            ):
                with pytest.raises(ValueError, match="expected"):
                    call()
                assert modes() == before
