"""``wnkernel.weight_norm`` beside torch's: same keys, values, semantics and training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import wnkernel
from wnkernel import functional as F

from .. import reference
from ..layers import (
    LAYERS,
    Doubled,
    all_dims,
    all_layers,
    assert_same_state,
    assert_state_as_torchs,
    originals,
    run,
    twins,
)


@all_dims
@all_layers
def test_same_state_dict(layer, dim):
    ours, torchs = twins(layer, dim, "ours", "torch")
    assert_state_as_torchs(ours.state_dict(), torchs.state_dict())
    assert [k for k, _ in ours.named_parameters()] == [k for k, _ in torchs.named_parameters()]


@all_dims
@all_layers
def test_same_weight_output_and_gradients(route, layer, dim):
    ours, torchs = twins(layer, dim, "ours", "torch")
    name = LAYERS[layer][1]
    g, v = originals(ours, name)
    reference.assert_close("w", getattr(ours, name), reference.forward(v, g, dim))
    torch.testing.assert_close(run(ours, layer), run(torchs, layer))
    for module in (ours, torchs):
        run(module, layer).square().sum().backward()
    grads = [{k: p.grad for k, p in m.named_parameters()} for m in (ours, torchs)]
    torch.testing.assert_close(*grads)


@all_dims
@all_layers
def test_applying_keeps_the_weight(layer, dim):
    build, name, _ = LAYERS[layer]
    module = build()
    before = getattr(module, name).detach().clone()
    assert wnkernel.weight_norm(module, name, dim) is module
    _, v = originals(module, name)
    assert torch.equal(v, before)
    torch.testing.assert_close(getattr(module, name), before)


@pytest.mark.parametrize("shape", [(3, 0), (0, 3), (0, 0)], ids=str)
@pytest.mark.parametrize("dim", [0, 1, None])
def test_zero_size_layer(route, shape, dim):
    module = nn.Module()
    module.weight = nn.Parameter(torch.empty(shape))
    wnkernel.weight_norm(module, dim=dim)
    g, _ = originals(module)
    assert torch.equal(g, torch.zeros(reference.norm(torch.empty(shape), dim).shape))
    assert module.weight.shape == shape
    assert wnkernel.remove_weight_norm(module).weight.shape == shape


@pytest.mark.parametrize("size", [1e30, 1e-30])
@pytest.mark.parametrize("dim", [0, 1, None])
def test_g_of_extreme_weights_is_right(size, dim):
    """torch's g is inf or 0 here; everywhere else ours has its bits."""
    module = nn.Linear(5, 4)
    with torch.no_grad():
        module.weight[2] *= size
    want = reference.norm(module.weight, dim)
    wnkernel.weight_norm(module, dim=dim)
    g, _ = originals(module)
    reference.assert_close("g", g, reference.Expected(want, want, 20, torch.float32))


def test_is_parametrized():
    module = wnkernel.weight_norm(nn.Conv1d(3, 4, 3))
    assert parametrize.is_parametrized(module, "weight")
    assert not parametrize.is_parametrized(module, "bias")
    assert isinstance(module, nn.Conv1d)
    assert parametrize.type_before_parametrizations(module) is nn.Conv1d
    assert isinstance(module.parametrizations.weight, parametrize.ParametrizationList)
    assert isinstance(module.parametrizations.weight[0], wnkernel.WeightNorm)


def test_repr_shows_the_settings():
    assert repr(wnkernel.WeightNorm(1)) == "WeightNorm(dim=1)"
    assert repr(wnkernel.WeightNorm(None, eps=0.5)) == "WeightNorm(dim=-1, eps=0.5)"


def test_cached():
    module = wnkernel.weight_norm(nn.Linear(5, 4))
    assert module.weight is not module.weight
    with parametrize.cached():
        assert module.weight is module.weight


def test_init_on_the_originals():
    module = wnkernel.weight_norm(nn.Linear(5, 4))
    g, v = originals(module)
    nn.init.normal_(v)
    nn.init.constant_(g, 2.0)
    torch.testing.assert_close(module.weight.norm(dim=1), torch.full((4,), 2.0))


@all_dims
@all_layers
def test_assigning_the_weight(layer, dim):
    ours, torchs = twins(layer, dim, "ours", "torch")
    name = LAYERS[layer][1]
    before = [id(p) for p in ours.parameters()]
    new = torch.randn_like(getattr(ours, name))
    for module in (ours, torchs):
        setattr(module, name, new)
    assert [id(p) for p in ours.parameters()] == before
    assert_state_as_torchs(ours.state_dict(), torchs.state_dict())
    torch.testing.assert_close(getattr(ours, name), new)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_to_dtype(route, dtype):
    ours, torchs = twins("Linear", 0, "ours", "torch")
    assert_state_as_torchs(ours.to(dtype).state_dict(), torchs.to(dtype).state_dict())
    assert ours.weight.dtype == dtype
    g, v = originals(ours)
    reference.assert_close("w", ours.weight, reference.forward(v, g, 0))
    assert run(ours, "Linear", dtype).dtype == dtype


def test_applied_to_a_half_layer():
    ours, torchs = (
        apply(nn.Linear(5, 4).half())
        for apply in (wnkernel.weight_norm, nn.utils.parametrizations.weight_norm)
    )
    torchs.load_state_dict(ours.state_dict())
    assert ours.weight.dtype == torch.float16
    torch.testing.assert_close(run(ours.float(), "Linear"), run(torchs.float(), "Linear"))


@pytest.mark.parametrize("frozen", ["g", "v", "both"])
def test_requires_grad_toggles(route, frozen):
    module = wnkernel.weight_norm(nn.Linear(5, 4))
    g, v = originals(module)
    g.requires_grad_(frozen == "v")
    v.requires_grad_(frozen == "g")
    assert module.weight.requires_grad == (frozen != "both")
    run(module, "Linear").sum().backward()
    assert (g.grad is not None) == (frozen == "v")
    assert (v.grad is not None) == (frozen == "g")
    g.requires_grad_(), v.requires_grad_()
    run(module, "Linear").sum().backward()
    assert g.grad is not None
    assert v.grad is not None


def test_deepcopy(route):
    module = wnkernel.weight_norm(nn.Linear(5, 4))
    module(torch.ones(2, 5)).sum().backward()  # whatever a forward leaves behind is copied too
    module.zero_grad()
    twin = copy.deepcopy(module)
    assert_same_state(twin.state_dict(), module.state_dict())
    run(twin, "Linear").sum().backward()
    assert all(p.grad is not None for p in twin.parameters())
    assert all(p.grad is None for p in module.parameters())
    before = module.weight.clone()
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(3)
    assert torch.equal(module.weight, before)
    assert not torch.equal(twin.weight, before)


def test_functional_call(route):
    module = wnkernel.weight_norm(nn.Linear(5, 4))
    other = {k: torch.randn_like(p) for k, p in module.named_parameters()}
    got = torch.func.functional_call(module, other, torch.ones(2, 5))
    g, v = (other[f"parametrizations.weight.original{k}"] for k in (0, 1))
    want = nn.functional.linear(torch.ones(2, 5), F.weight_norm(v, g), other["bias"])
    assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # no input needs a gradient
@pytest.mark.parametrize("whose", ["list", "weight norm"])
@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_fire(route, register, whose):
    module = wnkernel.weight_norm(nn.Linear(5, 4))
    target = module.parametrizations.weight
    calls = []
    handle = getattr(target if whose == "list" else target[0], register)(
        lambda *_: calls.append(None)
    )
    run(module, "Linear").sum().backward()
    assert len(calls) == 1
    handle.remove()
    run(module, "Linear").sum().backward()
    assert len(calls) == 1


def test_forward_hook_may_change_the_weight(route):
    module = wnkernel.weight_norm(nn.Linear(5, 4))
    module.parametrizations.weight[0].register_forward_hook(lambda *_: torch.zeros(4, 5))
    assert torch.equal(module.weight, torch.zeros(4, 5))


def test_global_hooks_fire(route):
    module = wnkernel.weight_norm(nn.Linear(5, 4))
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    try:
        run(module, "Linear")
    finally:
        handle.remove()
    assert wnkernel.WeightNorm in seen


def test_stacking_a_parametrization(route):
    module = wnkernel.weight_norm(nn.Linear(5, 4))
    w = module.weight.detach().clone()
    parametrize.register_parametrization(module, "weight", Doubled())
    torch.testing.assert_close(module.weight, 2 * w)
    module.weight = w
    torch.testing.assert_close(module.weight, w)
    run(module, "Linear").sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_stacking_spectral_norm(route):
    module = wnkernel.weight_norm(nn.Linear(5, 4))
    nn.utils.parametrizations.spectral_norm(module, n_power_iterations=30)
    largest = torch.linalg.matrix_norm(module.weight, 2)
    assert largest.item() == pytest.approx(1, rel=1e-3)


class Shifted(wnkernel.WeightNorm):
    """A user's subclass with a forward of its own."""

    def forward(self, weight_g: torch.Tensor, weight_v: torch.Tensor) -> torch.Tensor:
        return super().forward(weight_g, weight_v) + 1


def test_subclass_registered_by_hand(route):
    module = nn.Linear(5, 4)
    w = module.weight.detach().clone()
    parametrize.register_parametrization(module, "weight", Shifted(0), unsafe=True)
    torch.testing.assert_close(module.weight, w + 1)


def test_eps(route):
    module = nn.Linear(5, 4)
    with torch.no_grad():
        module.weight[2] = 0
    wnkernel.weight_norm(module, eps=1e-6)
    assert module.weight[2].eq(0).all()
    run(module, "Linear").sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dim", [0, 1, None])
def test_training_equals_torchs(backend, dim, dtype):
    def net(apply):
        return nn.Sequential(
            apply(nn.Conv1d(2, 8, 3, padding=1), dim=dim),
            nn.Tanh(),
            apply(nn.ConvTranspose1d(8, 4, 4, stride=2), dim=dim),
            nn.Tanh(),
            apply(nn.Conv1d(4, 1, 3), dim=dim),
        ).to(dtype)

    ours, torchs = net(wnkernel.weight_norm), net(nn.utils.parametrizations.weight_norm)
    torchs.load_state_dict(ours.state_dict())
    start = copy.deepcopy(ours.state_dict())
    x = torch.randn(4, 2, 16, dtype=dtype)
    for module in (ours, torchs):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            module(x).sub(1).square().mean().backward()
            optimizer.step()
    # Five steps of rounding at most: a hundred eps, where a stale or wrong weight shows at 1e-2.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        ours.state_dict(), torchs.state_dict(), rtol=100 * eps, atol=20 * eps
    )
    assert all((start[k] - p).abs().max() > 1e-3 for k, p in ours.state_dict().items())


def test_symbolic_trace_keeps_the_weight_alive():
    """torch.fx replaces nn.Module.__call__: going around it would freeze the weight."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            return nn.functional.linear(x, self.weight)

    layer = wnkernel.weight_norm(Layer())
    traced = torch.fx.symbolic_trace(layer)
    x = torch.randn(2, 4)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2)
    assert torch.equal(traced(x), layer(x))


def test_a_buffer_for_g():
    layer = wnkernel.weight_norm(nn.Linear(4, 3))
    originals = layer.parametrizations.weight
    w, g = layer.weight.detach().clone(), originals.original0.detach().clone()
    del originals.original0
    originals.register_buffer("original0", g)
    assert torch.equal(layer.weight, w)
    layer.load_state_dict({"weight": -2 * w, "bias": layer.bias.detach()})
    assert torch.equal(layer.weight, -2 * w)
    assert originals.original0 is g
    torch.testing.assert_close(g, (2 * w).norm(dim=1, keepdim=True))


def test_tensor_subclasses_keep_their_class():
    class Marked(torch.Tensor):
        pass

    v, g = torch.randn(3, 4), torch.rand(3, 1)
    w = wnkernel.functional.weight_norm(v.as_subclass(Marked), g)
    assert type(w) is Marked
    assert torch.equal(w.as_subclass(torch.Tensor), wnkernel.functional.weight_norm(v, g))
