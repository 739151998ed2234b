"""The node of a launch: run more than once, in parts, and differentiated twice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import wnkernel
from wnkernel.backends import BACKENDS

from .. import reference
from ..groups import (
    LAYERS,
    assert_same_tensors,
    both_modes,
    gradients,
    layer,
    originals,
    twins,
    weights,
)
from ..versions import since

Function = Callable[[Tensor], Tensor]


# Several backwards


@both_modes
def test_two_losses_over_the_same_weights(route, reuse):
    model, twin, group = twins(reuse)
    with group.scope():
        outputs = [model(), model()]
    for y in outputs:
        y.square().sum().backward()
    for _ in range(2):
        twin().square().sum().backward()
    assert_same_tensors(gradients(model), gradients(twin))


def test_gradient_accumulation_computes_the_weights_once(route, computed):
    model, twin, _ = twins("version")
    computed.take()
    for scale in (1, 2, 3):
        (model() * scale).sum().backward()
    assert computed.take() == ([7], 0)
    for scale in (1, 2, 3):
        (twin() * scale).sum().backward()
    assert_same_tensors(gradients(model), gradients(twin))


@both_modes
def test_retain_graph(route, reuse):
    model, twin, _ = twins(reuse)
    for module in (model, twin):
        y = module()
        y.sum().backward(retain_graph=True)
        y.square().sum().backward()
    assert_same_tensors(gradients(model), gradients(twin))


@both_modes
def test_the_node_itself_needs_no_retain_graph(route, reuse):
    """What follows it may be gone: only operators that saved a tensor ask to retain the graph."""
    model, twin, group = twins(reuse)
    for module in (model, twin):
        with group.scope():
            ws = list(weights(module).values())
        for _ in range(2):
            torch.autograd.backward(ws, [torch.full_like(w, 0.5) for w in ws])
    assert_same_tensors(gradients(model), gradients(twin))


@both_modes
def test_grad_of_some_parameters_at_a_time(route, reuse):
    model, twin, _ = twins(reuse)
    found = []
    for module in (model, twin):
        loss = module().square().sum()
        parameters = originals(module)
        some, others = parameters[::3], [p for k, p in enumerate(parameters) if k % 3]
        first = torch.autograd.grad(loss, some, retain_graph=True)
        second = torch.autograd.grad(loss, others, retain_graph=True)
        again = torch.autograd.grad(loss, some)
        found.append([*first, *second, *again])
        assert all(p.grad is None for p in module.parameters())
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


@both_modes
@pytest.mark.parametrize("which", [0, 1], ids=["g", "v"])
def test_a_change_in_place_before_the_backward_raises(route, which, reuse):
    """As autograd's version check would, and for the changed weight only."""
    model, _, group = twins(reuse)
    conv = layer(model, "front.conv")
    p = getattr(conv.parametrizations.weight, f"original{which}")
    with group.scope():
        changed, other = conv.weight.sum(), layer(model, "head").weight.sum()
    version = p._version
    with torch.no_grad():
        p.mul_(2)
    other.backward()
    words = f"modified by an inplace operation: .* {version + 1}; expected version {version} inst"
    with pytest.raises(RuntimeError, match=words):
        changed.backward()
    assert all(q.grad is None for q in conv.parametrizations.weight.parameters())


def test_a_change_in_place_before_the_second_derivative_raises(route):
    model, _, group = twins()
    v = layer(model, "head").parametrizations.weight.original1
    with group.scope():
        loss = layer(model, "head").weight.square().sum()
    (grad,) = torch.autograd.grad(loss, v, create_graph=True)
    with torch.no_grad():
        v.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grad.sum().backward()


# Members without a gradient


@pytest.fixture
def differentiated(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, ...], tuple[bool, bool]]:
    """What the eager backend computes: the shape of v, and whether grad_v and grad_g are wanted."""
    found = {}
    backward = BACKENDS["eager"].gradients

    def watched(problems, norms, grad_ws, need_v, need_g):
        shapes = [tuple(p.v.shape) for p in problems]
        found.update(zip(shapes, zip(need_v, need_g, strict=True), strict=True))
        return backward(problems, norms, grad_ws, need_v, need_g)

    monkeypatch.setattr(BACKENDS["eager"], "gradients", watched)
    return found


@both_modes
def test_unused_members_get_no_gradient(route, reuse):
    model, twin, _ = twins(reuse)
    for skip in ((), LAYERS[:3], ("head",), LAYERS[1::2]):
        for module in (model, twin):
            module.zero_grad()
            module(skip=skip).sum().backward()
        assert_same_tensors(gradients(model), gradients(twin))


@pytest.mark.parametrize(
    "register",
    [
        Tensor.register_hook,
        pytest.param(
            Tensor.register_post_accumulate_grad_hook,
            marks=since("2.8", "torch 2.7 calls no such hook where there is no gradient"),
        ),
    ],
)
def test_hooks_of_unused_parameters_see_none(route, register):
    """Single weights would not call them at all: docs/fuse.md says so."""
    model, _, _ = twins()
    calls = []
    for name in ("front.conv", "head"):
        v = layer(model, name).parametrizations.weight.original1
        see = (lambda p: p.grad) if "post" in register.__name__ else (lambda grad: grad)
        register(v, lambda t, name=name, see=see: calls.append((name, see(t) is None)))
    model(skip=("head",)).sum().backward()
    assert sorted(calls) == [("front.conv", False), ("head", True)]


@both_modes
def test_frozen_members_cost_no_gradient(route, differentiated, reuse):
    model, twin, group = twins(reuse)
    for module in (model, twin):
        layer(module, "front").requires_grad_(False)
        layer(module, "head").parametrizations.weight.original1.requires_grad_(False)
        layer(module, "back.image").parametrizations.weight.original0.requires_grad_(False)
    with group.scope():
        requires_grad = {name: w.requires_grad for name, w in weights(model).items()}
        model().sum().backward()
    assert requires_grad == {name: not name.startswith("front") for name in LAYERS}
    if route == "eager":
        half = {(6, 4, 3, 3): (True, False), (4, 9): (False, True)}
        assert differentiated == half | {(3, 5): (True, True), (6, 7): (True, True)}
    twin().sum().backward()
    assert_same_tensors(gradients(model), gradients(twin))


@both_modes
def test_a_frozen_model_has_no_node(route, reuse):
    model, _, group = twins(reuse)
    model.requires_grad_(False)
    with group.scope():
        assert all(w.grad_fn is None and not w.requires_grad for w in weights(model).values())
    assert not model().requires_grad


# Second derivatives


class Critic(nn.Module):
    """A discriminator in float64, smooth enough for second derivatives."""

    def __init__(self, norm: Callable[..., nn.Module] = wnkernel.weight_norm) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            norm(nn.Conv1d(1, 4, 5, stride=2)),
            nn.Tanh(),
            norm(nn.Conv1d(4, 3, 3), dim=1),
            nn.Tanh(),
            norm(nn.Conv1d(3, 2, 3), dim=2),
            nn.Tanh(),
            norm(nn.Conv1d(2, 1, 3), dim=None),
        )
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((1, 2))


def composed(critic: nn.Module) -> Function:
    """The same function through the float64 formula, of leaves that are the critic's parameters."""
    plain = Critic(lambda module, dim=0: module)

    def call(x: Tensor) -> Tensor:
        values = {}
        for name, p in critic.named_parameters():
            path, _, key = name.partition(".parametrizations.")
            if key.endswith("original1"):
                weight = critic.get_submodule(path).parametrizations.weight
                g, v, dim = weight.original0, weight.original1, weight[0].dim
                values[f"{path}.weight"] = reference.weight_norm(v, g, dim)
            elif not key:
                values[name] = p
        return functional_call(plain, values, x)

    return call


def r1(critic: Function, _: list[Tensor], real: Tensor, fake: Tensor) -> Tensor:
    """The gradient penalty of Mescheder et al. 2018 beside the GAN loss."""
    real = real.clone().requires_grad_()
    score = critic(real)
    (slope,) = torch.autograd.grad(score.sum(), real, create_graph=True)
    losses = nn.functional.softplus(critic(fake)) + nn.functional.softplus(-score)
    return losses.mean() + 5 * slope.square().sum((1, 2)).mean()


def wgan_gp(critic: Function, _: list[Tensor], real: Tensor, fake: Tensor) -> Tensor:
    between = (0.3 * real + 0.7 * fake).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
    return critic(fake).mean() - critic(real).mean() + 10 * penalty


def weight_penalty(critic: Function, parameters: list[Tensor], real: Tensor, _: Tensor) -> Tensor:
    """The second derivative in v and g themselves."""
    grads = torch.autograd.grad(critic(real).square().sum(), parameters, create_graph=True)
    return sum(grad.square().sum() for grad in grads)


@both_modes
@pytest.mark.parametrize("penalty", [r1, wgan_gp, weight_penalty])
def test_gradient_penalties(route, penalty, reuse):
    model, twin, _ = twins(reuse, build=Critic)
    real, fake = torch.randn(2, 3, 1, 40, dtype=torch.float64)
    penalty(model, originals(model), real, fake).backward()
    penalty(composed(twin), originals(twin), real, fake).backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_gradgradcheck_through_functional_call(route, computed):
    model, _, _ = twins(build=Critic)
    names, parameters = zip(*model.named_parameters(), strict=True)
    x = torch.randn(2, 1, 24, dtype=torch.float64)

    def call(*values: Tensor) -> Tensor:
        return functional_call(model, dict(zip(names, values, strict=True)), x)

    values = [p.detach().clone().requires_grad_() for p in parameters]
    computed.take()
    call(*values)
    assert computed.take() == ([4], 0)
    fast = route == "triton"  # the interpreter takes 15 ms for each of the many evaluations
    assert torch.autograd.gradcheck(call, values, fast_mode=fast)
    assert torch.autograd.gradgradcheck(call, values, fast_mode=fast)
