"""Bad input to ``weight_norm(module)`` and ``remove_weight_norm``: a clear error, and a module that
is as it was. The checks here are Python's for every backend."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import wnkernel

from ..layers import APPLY, all_kinds
from ..messages import FLOATS, message, quantised


class Odd(nn.Module):
    """One parameter of each kind that cannot be normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3))
        self.scalar = nn.Parameter(torch.ones(()))
        self.integer = nn.Parameter(torch.ones(4, 3, dtype=torch.int64), requires_grad=False)
        self.complex = nn.Parameter(torch.ones(4, 3, dtype=torch.complex64))
        self.sparse = nn.Parameter(torch.ones(4, 3).to_sparse())
        self.quantised = nn.Parameter(quantised(torch.ones(4, 3)), requires_grad=False)
        self.register_parameter("absent", None)
        self.register_buffer("buffer", torch.ones(4, 3))
        self.child = nn.Linear(2, 2)
        self.plain = torch.ones(4, 3)


LAYER_CASES = [
    (("nonsense",), ValueError, message("name", "weight, scalar", "'nonsense'")),
    (("absent",), ValueError, message("name", "a parameter", "'absent'")),
    (("buffer",), ValueError, message("name", "a parameter", "'buffer'")),
    (("child",), ValueError, message("name", "a parameter", "'child'")),
    (("child.weight",), ValueError, message("name", "a parameter", "'child.weight'")),
    (("plain",), ValueError, message("name", "a parameter", "'plain'")),
    (("",), ValueError, message("name", "a parameter", "''")),
    (("scalar", None), ValueError, message("v", "at least 1 dim", "0-dim")),
    (("integer",), TypeError, message("v", FLOATS, "int64")),
    (("complex",), TypeError, message("v", FLOATS, "complex64")),
    (("sparse",), TypeError, message("v", "dense strided", "sparse")),
    (("quantised",), TypeError, message("v", "dense strided", "quantized")),
    (("weight", 2), ValueError, message("dim", "-2 <= dim < 2", "2")),
    (("weight", -3), ValueError, message("dim", "-2 <= dim < 2", "-3")),
    (("weight", "0"), TypeError, message("dim", "int or None", "str")),
]


def snapshot(module: nn.Module) -> tuple:
    return (
        type(module),
        list(module._parameters),
        {key: id(p) for key, p in module.named_parameters()},
        list(module._load_state_dict_pre_hooks),
        list(module._forward_pre_hooks),
        list(module._modules),
    )


@pytest.mark.parametrize(("arguments", "error", "pattern"), LAYER_CASES, ids=lambda x: str(x)[:30])
def test_layer(arguments, error, pattern):
    module = Odd()
    before = snapshot(module)
    with pytest.raises(error, match=pattern):
        wnkernel.weight_norm(module, *arguments)
    assert snapshot(module) == before


def test_a_container_names_a_layer_of_it():
    model = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"apply it to the layers, .* '1.0' \(Linear\)"):
        wnkernel.weight_norm(model)


@pytest.mark.parametrize(("eps", "error"), [(-1.0, ValueError), ("0", TypeError)])
def test_layer_eps(eps, error):
    module = nn.Linear(3, 4)
    before = snapshot(module)
    with pytest.raises(error, match=r"^eps: expected .*got"):
        wnkernel.weight_norm(module, eps=eps)
    assert snapshot(module) == before


TITLES = {
    "ours": "wnkernel.weight_norm",
    "torch": "torch.nn.utils.parametrizations.weight_norm",
    "legacy": "torch.nn.utils.weight_norm",
}


@all_kinds
def test_already_weight_normed(kind):
    module = APPLY[kind](nn.Linear(3, 4))
    before, values = snapshot(module), {k: t.clone() for k, t in module.state_dict().items()}
    with pytest.raises(RuntimeError, match=message("name", "without weight norm", TITLES[kind])):
        wnkernel.weight_norm(module)
    assert snapshot(module) == before
    assert all(torch.equal(t, values[k]) for k, t in module.state_dict().items())


def test_other_parametrization_first():
    module = nn.utils.parametrizations.orthogonal(nn.Linear(3, 4))
    before = snapshot(module)
    with pytest.raises(RuntimeError, match=message("name", "without parametrizations", "'weight'")):
        wnkernel.weight_norm(module)
    assert snapshot(module) == before


def test_uninitialised_layer():
    module = nn.LazyLinear(4)
    with pytest.raises(ValueError, match=message("name", "initialised", "'weight'")):
        wnkernel.weight_norm(module)
    assert type(module) is nn.LazyLinear


@pytest.mark.parametrize("apply", [wnkernel.weight_norm, wnkernel.remove_weight_norm])
@pytest.mark.parametrize("module", [None, torch.ones(3, 4), nn.Linear, [nn.Linear(3, 4)]])
def test_not_a_module(apply, module):
    with pytest.raises(TypeError, match=message("module", "torch.nn.Module", "")):
        apply(module)


@pytest.mark.parametrize("name", ["weight", "bias", "nonsense"])
def test_remove_what_is_not_there(name):
    module = nn.Linear(3, 4)
    before = snapshot(module)
    with pytest.raises(ValueError, match=message("name", "weight-normed parameter", f"'{name}'")):
        wnkernel.remove_weight_norm(module, name)
    assert snapshot(module) == before


def test_remove_beneath_another_parametrization():
    module = wnkernel.weight_norm(nn.Linear(3, 4))
    nn.utils.parametrizations.spectral_norm(module)
    before = snapshot(module)
    with pytest.raises(RuntimeError, match=message("name", "weight norm alone", "_SpectralNorm")):
        wnkernel.remove_weight_norm(module)
    assert snapshot(module) == before


@pytest.mark.parametrize("fused", [False, True])
def test_what_two_weight_norms_can_mean_is_a_norm_of_v(fused):
    """Twice on one parameter is refused; the second can be on v, with a dim of its own."""
    module = wnkernel.weight_norm(nn.Linear(4, 3))
    w = module.weight.detach().clone()
    wnkernel.weight_norm(module.parametrizations.weight, "original1", dim=1)
    model = nn.Sequential(module)
    if fused:
        wnkernel.fuse(model)
    torch.testing.assert_close(module.weight, w)
    model(torch.randn(2, 4)).square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    copied = copy.deepcopy(model)
    copied.load_state_dict(model.state_dict())
    wnkernel.fold(copied)
    torch.testing.assert_close(copied[0].weight.detach(), w)
