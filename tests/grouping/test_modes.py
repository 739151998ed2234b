"""Weights depend on more than their parameters: every mode has launches of its own, and what is
bound to a transform, a tracer or a mode does not outlive it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, functionalize, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import wnkernel

from ..changes import in_inference_mode, in_place, moved
from ..groups import (
    LAYERS,
    Computed,
    Net,
    assert_same,
    assert_same_models,
    assert_same_tensors,
    both_modes,
    layer,
    originals,
    ramp,
    twins,
    weights,
)
from ..torch_modes import Dispatches, Functions, deterministic


def test_a_launch_covers_what_the_previous_forward_read(backend: str, computed: Computed) -> None:
    model, twin, _ = twins("forward")

    def run(*skip: str) -> tuple[list[int], int]:
        want = twin(skip)
        computed.take()
        assert_same(model(skip), want)
        return computed.take()

    assert run("conv", "head") == ([7], 0)  # not known yet: all
    assert run("conv", "head") == ([5], 0)
    assert run("wide") == ([6], 1)  # the first that is read joins the launch
    assert run() == ([6], 1)
    assert run() == ([7], 0)
    two_only = "up", "wide", "image", "coarse", "head"
    assert [run(*two_only) for _ in range(2)] == [([7], 0), ([2], 0)]
    model.front()  # a container of its own, with a past of its own
    assert computed.take() == ([3], 0)


def test_each_mode_has_a_past_of_its_own(backend: str, computed: Computed) -> None:
    model, _, _ = twins("forward")
    for in_no_grad in (7, 5, 5):
        model()
        assert computed.take() == ([7], 0)
        with torch.no_grad():
            model(("conv", "head"))
        assert computed.take() == ([in_no_grad], 0)


MODES: dict[str, Callable[[], AbstractContextManager]] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "eager": lambda: wnkernel.use_backend("eager"),
    "deterministic": deterministic,
}


@both_modes
def test_every_mode_has_a_launch_of_its_own(reuse: str, computed: Computed) -> None:
    model, twin, group = twins(reuse)
    first: dict[str, dict[str, Tensor]] = {}
    with group.scope():
        for _ in range(2):
            for name, mode in MODES.items():
                with mode():
                    want = weights(twin)
                    computed.take()
                    got = weights(model)
                    assert {*computed.take()[0]} == (set() if name in first else {7}), name
                    assert_same_tensors(got, want)
                before = first.setdefault(name, got)
                assert all(got[key] is before[key] for key in got)
    assert group.memory()["slots"] == (0 if reuse == "forward" else 7 * len(MODES))


@both_modes
def test_a_default_device_does_not_part_the_launch(
    backend: str, reuse: str, computed: Computed
) -> None:
    """It is a function mode, to torch."""
    model, _, _ = twins(reuse)
    with torch.empty(0).device:
        model()
    launches, alone = computed.take()
    assert ({*launches}, alone) == ({7}, 0)  # torch asks the mode first, and comes once more


@both_modes
def test_forwards_in_changing_modes(reuse: str) -> None:
    model, twin, _ = twins(reuse)
    modes = MODES | {"function mode": Functions}
    for name in [*modes, *reversed(modes), *modes]:
        with modes[name]():
            assert_same_models(model, twin)
        for module in (model, twin):
            in_place(originals(module)[0])


# Transforms, tracers and modes that make tensors of their own


def tangents(model: nn.Module) -> dict[str, Tensor]:
    return {key: ramp(*p.shape, dtype=p.dtype) for key, p in model.named_parameters()}


def of_dual_tensors(model: nn.Module) -> Tensor:
    along = tangents(model)
    with forward_ad.dual_level():
        duals = {
            key: forward_ad.make_dual(p.detach(), along[key]) for key, p in model.named_parameters()
        }
        return forward_ad.unpack_dual(functional_call(model, duals, ())).tangent.clone()


def of_one_dual_tensor(model: nn.Module) -> Tensor:
    """Its neighbours in the launch have no tangent."""
    key = "head.parametrizations.weight.original1"
    p = dict(model.named_parameters())[key]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(p, ramp(*p.shape))
        y = forward_ad.unpack_dual(functional_call(model, {key: dual}, ()))
        return torch.stack([y.primal, y.tangent])


def of_jvp(model: nn.Module) -> Tensor:
    parameters = {key: p.detach() for key, p in model.named_parameters()}
    both = jvp(lambda p: functional_call(model, p, ()), (parameters,), (tangents(model),))
    return torch.stack(both)


def of_grad(model: nn.Module) -> Tensor:
    parameters = {key: p.detach() for key, p in model.named_parameters()}
    grads = grad(lambda p: functional_call(model, p, ()).square().mean())(parameters)
    return torch.cat([g.flatten().double() for g in grads.values()])


def of_vmap(model: nn.Module) -> Tensor:
    stacked = {key: torch.stack([p.detach(), moved(p)]) for key, p in model.head.named_parameters()}
    return vmap(lambda p: functional_call(model.head, p, ramp(2, 9)))(stacked)


def of_fake_tensors(model: nn.Module) -> Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True):
        size = model().numel()
    return torch.tensor(size)


TRANSFORMS: dict[str, Callable[[nn.Module], Any]] = {
    "vmap over inputs": lambda model: vmap(model.head)(ramp(3, 2, 9)),
    "vmap over parameters": of_vmap,
    "grad": of_grad,
    "jvp": of_jvp,
    "functionalize": lambda model: functionalize(model)(),
    "dual tensors": of_dual_tensors,
    "one dual tensor": of_one_dual_tensor,
    "make_fx": lambda model: make_fx(model.head)(ramp(2, 9))(ramp(2, 9)),
    "make_fx symbolic": lambda model: make_fx(
        model.head, tracing_mode="symbolic", _allow_non_fake_inputs=True
    )(ramp(2, 9))(ramp(2, 9)),
    "jit.trace": lambda model: torch.jit.trace(model.head, ramp(2, 9), check_trace=False)(
        ramp(2, 9)
    ),
    "fake tensors": of_fake_tensors,
    "dispatch mode": lambda model: run_in(Dispatches(), model),
    "function mode": lambda model: run_in(Functions(), model),
}


def run_in(mode: AbstractContextManager, model: nn.Module) -> Tensor:
    with mode:
        return model()


@pytest.mark.parametrize("read_before", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@both_modes
def test_transforms_leave_nothing_behind(
    backend: str, reuse: str, transform: Callable[[nn.Module], Any], read_before: bool
) -> None:
    """In the middle of a scope: neither do their tensors get out nor the group's in."""
    model, twin, group = twins(reuse)
    with group.scope():
        if read_before:
            assert_same_models(model, twin)
        assert_same(transform(model), transform(twin))
        for name, w in weights(model).items():
            assert type(w) is Tensor
            assert forward_ad.unpack_dual(w).tangent is None
            assert_same(w, weights(twin)[name])
        assert_same_models(model, twin)
        model().sum().backward()
    assert_same_models(model, twin)
    assert_same(transform(model), transform(twin))


@pytest.mark.parametrize(
    "name", ["vmap over inputs", "make_fx", "jit.trace", "dispatch mode", "function mode"]
)
def test_under_transforms_weights_are_computed_alone(
    backend: str, name: str, computed: Computed
) -> None:
    model, _, group = twins("version")
    model(), computed.take()
    with group.scope():
        TRANSFORMS[name](model)
    launches, alone = computed.take()
    assert launches == []
    assert alone > 0


# Writes to what was read


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "mul_": lambda w: w.mul_(2),
    "view": lambda w: w.view(-1).mul_(2),
    "detach": lambda w: w.detach().zero_(),
    "init": nn.init.ones_,
    "transpose_": lambda w: w.transpose_(0, 1),
    ".data =": lambda w: setattr(w, "data", torch.ones(2, 2, dtype=w.dtype)),
    "detach_": lambda w: w.detach_(),
    "requires_grad_": lambda w: w.is_leaf and w.requires_grad_(not w.is_inference()),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("within", ["scope", "nothing"])
@pytest.mark.parametrize("mode", ["no_grad", "inference", "grad"])
@both_modes
def test_what_is_done_to_a_weight_reaches_no_other_read(
    reuse: str, mode: str, within: str, write: Callable[[Tensor], Any]
) -> None:
    model, twin, group = twins(reuse)
    with MODES[mode](), group.scope() if within == "scope" else nullcontext():
        model()
        for w in weights(model).values():
            with torch.no_grad():
                write(w)
        assert_same_models(model, twin)
    assert_same_models(model, twin)


@both_modes
def test_initialising_weights_through_data_is_without_effect(backend: str, reuse: str) -> None:
    """As without a group: what many models do to layers that may or may not be normed."""
    model, twin, _ = twins(reuse)
    assert_same_models(model, twin)
    for name in LAYERS:
        layer(model, name).weight.data.normal_(0, 0.01)
    assert_same_models(model, twin)


# Parameters without a version counter


@both_modes
def test_inference_parameters_are_computed_alone(
    backend: str, reuse: str, computed: Computed
) -> None:
    with torch.inference_mode():
        model, twin, _ = twins(reuse, build=lambda: copy.deepcopy(Net()))
        for module in (model, twin):
            module.requires_grad_(False)
        assert all(p.is_inference() for p in originals(model))
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        for _ in range(2):
            with mode():
                assert_same_models(model, twin)
                computed.take()
                model()
                assert computed.take() == ([], 7)
            for module in (model, twin):
                for p in originals(module):
                    in_inference_mode(p)


@both_modes
def test_inference_parameters_among_others(backend: str, reuse: str, computed: Computed) -> None:
    model, twin, _ = twins(reuse)
    for module in (model, twin):
        weight = module.front.conv.parametrizations.weight
        with torch.inference_mode():
            weight.original1 = nn.Parameter(moved(weight.original1), requires_grad=False)
    for _ in range(2):
        with torch.no_grad():
            assert_same_models(model, twin)
            computed.take()
            model()
            assert computed.take() == ([6] if reuse == "forward" else [], 1)
        for module in (model, twin):
            in_inference_mode(module.front.conv.parametrizations.weight.original1)
