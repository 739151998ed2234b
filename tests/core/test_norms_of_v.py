"""A weight norm of v below the weight norm of a weight: two norms on one parameter, as
docs/convert.md recommends."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import wnkernel

from ..models.test_remove import assert_plain

BELOW = "parametrizations.weight.parametrizations.original1."


def ours() -> nn.Module:
    layer = wnkernel.weight_norm(nn.Conv1d(4, 5, 3))
    wnkernel.weight_norm(layer.parametrizations.weight, "original1", dim=1)
    return layer


def converted() -> nn.Module:
    layer = parametrizations.weight_norm(nn.Conv1d(4, 5, 3))
    parametrizations.weight_norm(layer.parametrizations.weight, "original1", dim=1)
    wnkernel.convert(layer)
    return layer


@pytest.fixture(params=[ours, converted], ids=["ours", "converted"])
def layer(request) -> nn.Module:
    torch.manual_seed(0)
    return request.param()


def weight() -> Tensor:
    """One with a row of zeros in either norm."""
    w = torch.randn(5, 4, 3)
    w[2] = 0
    w[:, 1] = 0
    return w


def assert_weight(layer: nn.Module, w: Tensor) -> None:
    torch.testing.assert_close(layer.weight.detach(), w, rtol=1e-6, atol=1e-6)


ASSIGN = {
    "assigned": lambda layer, w: setattr(layer, "weight", w),
    "parameter": lambda layer, w: setattr(layer, "weight", nn.Parameter(w)),
    "init": lambda layer, w: wnkernel.init_weight_(layer, lambda t: t.copy_(w)),
}


@pytest.mark.parametrize("assign", ASSIGN)
def test_assigning_gives_both_norms(layer, assign):
    parameters = {name: (p, p.data_ptr()) for name, p in layer.named_parameters()}
    w = weight()
    ASSIGN[assign](layer, w)
    assert_weight(layer, w)
    for name, p in layer.named_parameters():
        assert (p, p.data_ptr()) == parameters[name]
    layer(torch.randn(2, 4, 8)).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_a_weight_of_another_shape_is_refused(layer):
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match=r"^v: expected shape \(5, 4, 3\), got \(5, 4, 2\)"):
        layer.weight = torch.ones(5, 4, 2)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("keys", ["folded", "legacy", "parametrized", "own"])
def test_loading_from_every_layout(layer, keys, assign):
    bias, g, v = torch.randn(5), torch.rand(5, 1, 1) + 0.5, torch.randn(5, 4, 3)
    w = g * v / v.norm(dim=(1, 2), keepdim=True)
    state = {
        "folded": {"weight": w},
        "legacy": {"weight_g": g, "weight_v": v},
        "parametrized": {
            "parametrizations.weight.original0": g,
            "parametrizations.weight.original1": v,
        },
        "own": {
            "parametrizations.weight.original0": g,
            BELOW + "original0": v.norm(dim=(0, 2), keepdim=True),
            BELOW + "original1": 2 * v,
        },
    }[keys]
    layer.load_state_dict({"bias": bias} | state, assign=assign)
    assert_weight(layer, w)
    assert all(p.requires_grad and p.is_leaf for p in layer.parameters())
    again = type(layer)(4, 5, 3)  # plain
    again.load_state_dict({"bias": bias, "weight": w})
    torch.testing.assert_close(again(x := torch.randn(2, 4, 8)), layer(x), rtol=1e-5, atol=1e-5)


def test_the_list_loads_alone(layer):
    g, v = torch.rand(5, 1, 1), torch.randn(5, 4, 3)
    layer.parametrizations.weight.load_state_dict({"original0": g, "original1": v})
    assert_weight(layer, g * v / v.norm(dim=(1, 2), keepdim=True))


def test_what_does_not_fit_is_loaded_by_halves_nowhere(layer):
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for weight: expected a weight of shape"):
        layer.load_state_dict({"weight": torch.ones(5, 4, 2)}, strict=False)
    with pytest.raises(RuntimeError, match="Missing key.*" + BELOW + "original0"):
        layer.load_state_dict({"bias": torch.zeros(5)})
    assert all(torch.equal(t, before[key]) for key, t in layer.state_dict().items() if t.ndim > 1)


REMOVE = {
    "fold": wnkernel.fold,
    "ours": wnkernel.remove_weight_norm,
    "torch": nn.utils.remove_weight_norm,
    "parametrize": lambda layer: parametrize.remove_parametrizations(layer, "weight"),
}


@pytest.mark.parametrize("remove", REMOVE)
def test_nothing_is_left_behind(layer, remove):
    w = layer.weight.detach().clone()
    REMOVE[remove](layer)
    assert_plain(layer, nn.Conv1d(4, 5, 3), "weight")
    assert torch.equal(layer.weight, w)
    layer.load_state_dict({"bias": torch.zeros(5), "weight": torch.ones(5, 4, 3)})


def test_patched_removers(layer):
    w = layer.weight.detach().clone()
    with wnkernel.patch_torch():
        parametrize.remove_parametrizations(layer)
    assert torch.equal(layer.weight, w)


def test_models_with_such_layers_are_fused_and_folded(layer):
    model = nn.Sequential(layer, wnkernel.weight_norm(nn.Conv1d(5, 4, 1)), ours())
    x = torch.randn(2, 4, 8)
    y = model(x)
    group = wnkernel.fuse(model)
    below = "parametrizations.weight.original1"
    assert group.layers == [f"0.{below}", "1.weight", f"2.{below}"]
    assert torch.equal(model(x), y)
    assert wnkernel.fold(model) == ["0.weight", "1.weight", "2.weight"]
    assert torch.equal(model(x), y)
    assert set(model.state_dict()) == {
        f"{k}.{name}" for k in range(3) for name in ("bias", "weight")
    }


def test_two_layers_with_one_g_are_folded_apart():
    first, second = ours(), ours()
    second.parametrizations.weight.original0 = first.parametrizations.weight.original0
    weights = [m.weight.detach().clone() for m in (first, second)]
    model = nn.Sequential(first, second)
    wnkernel.fold(model)
    assert [torch.equal(m.weight, w) for m, w in zip(model, weights, strict=True)] == [True, True]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_can_be_assigned_to(layer, copied):
    w, other = layer.weight.detach().clone(), copied(layer)
    other.weight = weight()
    assert torch.equal(layer.weight, w)
    wnkernel.remove_weight_norm(other)
    assert torch.equal(layer.weight, w)


def test_data_dependent_init_sets_the_outer_g():
    layer, batch = ours(), torch.randn(3, 4, 20)
    assert wnkernel.data_dependent_init_(layer, batch) == ["weight"]
    y = layer(batch).transpose(0, 1).flatten(1)
    torch.testing.assert_close(y.std(1, correction=0), torch.ones(5))
