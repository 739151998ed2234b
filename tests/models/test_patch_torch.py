"""``wnkernel.patch_torch``: code written for torch's weight norm builds ours, in the block only."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import weight_norm as imported_earlier
from torch.nn.utils.parametrizations import spectral_norm

import wnkernel
from wnkernel.census import OURS, TORCH_HOOK, weight_norm_kind

from .. import small_models
from ..layers import (
    APPLY,
    LAYERS,
    all_kinds,
    all_layers,
    assert_same_state,
    legacy_weight_norm,
    originals,
    run,
)
from ..small_models import MODELS, all_models
from ..versions import since
from .test_remove import assert_plain

PATHS: dict[str, Callable[[], Callable[..., nn.Module]]] = {
    "torch.nn.utils.weight_norm": lambda: nn.utils.weight_norm,
    "torch.nn.utils.parametrizations.weight_norm": lambda: parametrizations.weight_norm,
    "torch.nn.utils.remove_weight_norm": lambda: nn.utils.remove_weight_norm,
    "torch.nn.utils.parametrize.remove_parametrizations": (
        lambda: parametrize.remove_parametrizations
    ),
}
OF_TORCH = {path: get() for path, get in PATHS.items()}

all_paths = pytest.mark.parametrize("path", PATHS)


@pytest.fixture(autouse=True)
def _torch_is_restored():
    yield
    assert {path: get() for path, get in PATHS.items()} == OF_TORCH
    assert imported_earlier is OF_TORCH["torch.nn.utils.weight_norm"]


def kind_of(layer: nn.Module) -> str | None:
    return weight_norm_kind(layer, "weight")


# What is built


@all_layers
def test_both_functions_build_ours(layer):
    build, name, _ = LAYERS[layer]
    plain = build()
    fresh = wnkernel.weight_norm(copy.deepcopy(plain), name)
    with wnkernel.patch_torch():
        for apply in (nn.utils.weight_norm, parametrizations.weight_norm):
            module = copy.deepcopy(plain)
            assert apply(module, name) is module
            assert weight_norm_kind(module, name) == OURS
            assert_same_state(module.state_dict(), fresh.state_dict())
            assert torch.equal(run(module, layer), run(fresh, layer))
            nn.utils.remove_weight_norm(module, name)
            assert_plain(module, build(), name)


# Some initialise a weight that is computed, which is lost with torch's weight norm as well.
@pytest.mark.filterwarnings("ignore:A write to the weight of a weight-normed layer was lost")
@all_models
def test_third_party_models(name):
    torch.manual_seed(0)
    twin = small_models.build(name)
    with wnkernel.patch_torch():
        torch.manual_seed(0)
        model = small_models.build(name)
        normed = [m for m in model.modules() if kind_of(m)]
        assert {kind_of(m) for m in normed} == {OURS}
        assert len(normed) == MODELS[name].layers
        with wnkernel.use_backend("eager"):
            assert torch.equal(small_models.run(model, name), small_models.run(twin, name))
        if hasattr(model, "remove_weight_norm"):  # raises with torch's own functions
            model.remove_weight_norm()
            assert not any(kind_of(m) for m in model.modules())


@all_paths
def test_signatures_are_torchs(path):
    want = inspect.signature(OF_TORCH[path]).parameters.values()
    with wnkernel.patch_torch():
        ours = PATHS[path]()
        assert ours is not OF_TORCH[path]
        got = inspect.signature(ours).parameters.values()
    for p, q in zip(got, want, strict=True):
        assert (p.name, p.kind) == (q.name, q.kind)
        assert p.default == ("weight" if p.name == "tensor_name" else q.default)


@pytest.mark.parametrize("dim", [0, 1, None, -1])
def test_arguments_by_position_and_by_name(dim):
    with wnkernel.patch_torch():
        for layer in (
            nn.utils.weight_norm(nn.Linear(5, 4), "weight", dim),
            nn.utils.weight_norm(module=nn.Linear(5, 4), name="weight", dim=dim),
            parametrizations.weight_norm(nn.Linear(5, 4), "weight", dim),
        ):
            assert layer.parametrizations.weight[0].dim == (-1 if dim is None else dim)


def test_errors_are_those_of_our_functions():
    with wnkernel.patch_torch():
        layer = nn.utils.weight_norm(nn.Linear(5, 4))
        with pytest.raises(RuntimeError, match="without weight norm"):
            nn.utils.weight_norm(layer)
        with pytest.raises(ValueError, match=r"^name: expected"):
            nn.utils.remove_weight_norm(nn.Linear(5, 4))
        with pytest.raises(ValueError, match="does not have a parametrization"):
            parametrize.remove_parametrizations(nn.Linear(5, 4), "weight")


# Removers


@all_kinds
def test_the_remover_takes_all_kinds(kind):
    """torch's own is for its legacy hook; transformers calls it for its parametrization."""
    layer = APPLY[kind](nn.Linear(5, 4))
    y = run(layer, "Linear")
    with wnkernel.patch_torch():
        nn.utils.remove_weight_norm(layer)
    assert torch.equal(run(layer, "Linear"), y)
    assert_plain(layer, nn.Linear(5, 4))


@pytest.mark.parametrize("kind", ["ours", "torch"])
def test_remove_parametrizations_leaves_nothing_behind(kind):
    """A frozen weight is a buffer afterwards with torch's own, and a load hook stays."""
    layer = APPLY[kind](nn.Linear(5, 4))
    layer.requires_grad_(False)
    with wnkernel.patch_torch():
        assert parametrize.remove_parametrizations(layer, "weight", True) is layer
    assert_plain(layer, nn.Linear(5, 4))


def test_remove_parametrizations_does_all_else_as_torch():
    stacked = spectral_norm(wnkernel.weight_norm(nn.Linear(5, 4))).eval()
    alone = spectral_norm(nn.Linear(5, 4)).eval()
    twin = copy.deepcopy(stacked)
    w, original = stacked.weight, alone.parametrizations.weight.original
    with wnkernel.patch_torch():
        parametrize.remove_parametrizations(stacked, "weight")
        parametrize.remove_parametrizations(alone, "weight", leave_parametrized=False)
        with pytest.raises(ValueError, match="leave_parametrized=False"):
            parametrize.remove_parametrizations(
                wnkernel.weight_norm(nn.Linear(5, 4)), "weight", leave_parametrized=False
            )
    assert_plain(stacked, nn.Linear(5, 4))
    assert torch.equal(stacked.weight, w)
    assert torch.equal(twin.weight, w)
    assert alone.weight is original


# Legacy names


def dino_head() -> nn.Module:
    """As in DINO's vision_transformer.py."""
    layer = imported_earlier(nn.Linear(5, 4, bias=False))
    layer.weight_g.data.fill_(1)
    layer.weight_g.requires_grad = False
    return layer


def test_published_code_that_writes_to_weight_g():
    with wnkernel.patch_torch():
        head = dino_head()
    g, v = originals(head)
    assert g.eq(1).all()
    assert not g.requires_grad
    torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(4))
    run(head, "Linear").sum().backward()
    assert g.grad is None
    assert v.grad is not None
    assert dict(head.named_parameters()).keys() == {
        "parametrizations.weight.original0",
        "parametrizations.weight.original1",
    }
    assert head.weight_g.shape == legacy_weight_norm(nn.Linear(5, 4)).weight_g.shape
    assert isinstance(head.weight_g, nn.Parameter)


def test_parameters_can_be_assigned():
    with wnkernel.patch_torch():
        layer = nn.utils.weight_norm(nn.Linear(5, 4))
    for key, original in (("weight_g", "original0"), ("weight_v", "original1")):
        new = nn.Parameter(torch.rand_like(getattr(layer, key)))
        setattr(layer, key, new)
        assert getattr(layer, key) is new
        assert getattr(layer.parametrizations.weight, original) is new
    with pytest.raises(TypeError, match="cannot assign"):
        layer.weight_g = torch.ones(4, 1)
    layer.bias = None
    layer.extra = 3
    assert layer.bias is None
    twin = copy.deepcopy(layer)
    twin.weight_g.data.mul_(2)
    torch.testing.assert_close(twin.weight, 2 * layer.weight)


def test_both_parameters_of_an_rnn():
    with wnkernel.patch_torch():
        rnn = nn.LSTM(4, 5)
        for name in ("weight_ih_l0", "weight_hh_l0"):
            nn.utils.weight_norm(rnn, name)
    assert rnn.weight_ih_l0_g is originals(rnn, "weight_ih_l0")[0]
    rnn.weight_hh_l0_v = new = nn.Parameter(torch.randn(20, 5))
    assert originals(rnn, "weight_hh_l0")[1] is new
    rnn.bias_hh_l0 = nn.Parameter(torch.zeros(20))  # a list of its own knows it too
    assert rnn._flat_weights[3] is rnn.bias_hh_l0
    wnkernel.remove_weight_norm(rnn, "weight_ih_l0")
    assert not hasattr(rnn, "weight_ih_l0_g")
    assert rnn.weight_hh_l0_v is new
    rnn.weight_ih_l0_g = nn.Parameter(torch.ones(2))  # anybody's name now
    assert "weight_ih_l0_g" in rnn._parameters


@pytest.mark.parametrize("by", ["ours", "torch"])
def test_names_end_with_the_weight_norm(by):
    with wnkernel.patch_torch():
        layer = nn.utils.weight_norm(nn.LSTM(4, 5), "weight_ih_l0")
    parametrize.register_parametrization(layer, "weight_hh_l0", nn.Identity())  # the class stays
    if by == "ours":
        wnkernel.remove_weight_norm(layer, "weight_ih_l0")
    else:
        parametrize.remove_parametrizations(layer, "weight_ih_l0")
    assert not hasattr(layer, "weight_ih_l0_g")
    legacy_weight_norm(layer, "weight_ih_l0")
    assert weight_norm_kind(layer, "weight_ih_l0") == TORCH_HOOK
    assert layer.weight_ih_l0_g is layer._parameters["weight_ih_l0_g"]
    run(layer, "LSTM ih")


@since("2.5", "torch.compile of torch 2.4 reads no property but plain ones, as weight_g is not")
def test_compiled_without_graph_breaks():
    torch.compiler.reset()
    with wnkernel.patch_torch():
        layer = nn.utils.weight_norm(nn.Linear(5, 4))

    def read() -> torch.Tensor:
        return layer.weight_g * layer(torch.ones(5)).sum()

    compiled = torch.compile(read, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(), read())
