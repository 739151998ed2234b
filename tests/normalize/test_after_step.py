"""normalize_after_step: after every step of an optimizer, rows have their norm again."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from wnkernel import after_step, normalize_, normalize_after_step, norms_of

from ..cases import randn
from ..messages import here
from .training import loss, matrices, model, step

F64 = torch.float64


def values(m: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in m.parameters()]


def assert_rows(tensors: Any, r: float = 1.0, dim: int | None = 0) -> None:
    """All have this norm."""
    for norm in norms_of(tensors, dim):
        torch.testing.assert_close(norm, torch.full_like(norm, r))


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda ps: SGD(ps, lr=0.1, momentum=0.9),
    "AdamW": lambda ps: AdamW(ps, lr=0.05, weight_decay=0.1),
    "AdamW, fused": lambda ps: AdamW(ps, lr=0.05, fused=True),
    "Adagrad, foreach": lambda ps: torch.optim.Adagrad(ps, lr=0.05, foreach=True),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("form", ["optimizer", "parameters"])
def test_it_is_normalize_after_each_step(route: str, kind: str, form: str) -> None:
    """Of what has rows: biases and gains are the optimizer's alone. Some rows are below eps."""
    m = model()
    twin = copy.deepcopy(m)
    optimizer, plain = OPTIMIZERS[kind](m.parameters()), OPTIMIZERS[kind](twin.parameters())
    before = values(m)
    what = optimizer if form == "optimizer" else iter(matrices(m))
    with normalize_after_step(what, dim=1, norm=2.0, eps=0.7):
        assert all(map(torch.equal, values(m), before))  # not before the first step
        for k in range(3):
            step(optimizer, m, k)
            step(plain, twin, k)
            with torch.no_grad():
                normalize_(matrices(twin), dim=1, norm=2.0, eps=0.7)
            assert_same(m, twin)


def test_one_call_for_all_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(tensors: Any, *args: Any, **options: Any) -> None:
        calls.append(len(tensors))
        normalize_(tensors, *args, **options)

    monkeypatch.setattr(after_step, "normalize_", counted)
    m = nn.Sequential(*(nn.Linear(3, 3) for _ in range(6)))
    optimizer = SGD(m.parameters(), lr=0.1)
    normalize_after_step(optimizer)
    m(randn((2, 3))).sum().backward()
    optimizer.step()
    assert calls == [6]
    assert_rows(matrices(m))


def test_parameters_that_are_added_later_join(route: str) -> None:
    m, late = model(), nn.Linear(4, 3)
    optimizer = SGD(m.parameters(), lr=0.1)
    normalize_after_step(optimizer, None, norm="sqrt_numel")
    step(optimizer, m)
    optimizer.add_param_group({"params": late.parameters(), "lr": 0.3})
    bias = late.bias.detach().clone()
    step(optimizer, m)
    assert_rows([late.weight], 12**0.5, None)
    assert torch.equal(late.bias, bias)


def test_keep_of_parameters_that_are_added_later(route: str) -> None:
    """It begins after their first step."""
    m, late = model(), nn.Linear(4, 3)
    optimizer = SGD(m.parameters(), lr=0.1)
    normalize_after_step(optimizer, norm="keep")
    kept = norms_of(matrices(m))
    optimizer.add_param_group({"params": late.parameters()})
    late.weight.grad = randn((3, 4))
    optimizer.step()
    first = norms_of(late.weight)
    for k in range(3):
        late.weight.grad = randn((3, 4))
        loss(m, k).backward()
        optimizer.step()
    torch.testing.assert_close(norms_of(late.weight), first)
    torch.testing.assert_close(norms_of(matrices(m)), kept)


def test_keep_after_many_steps(backend: str) -> None:
    """The norms are those at the call, not those that norms_of found before or after; rounding
    does not add up."""
    m = model()
    norms_of(matrices(m), None)
    with torch.no_grad():
        for p in matrices(m):
            p.mul_(2)
    kept = [p.norm().item() for p in matrices(m)]
    optimizer = AdamW(m.parameters(), lr=0.1)
    normalize_after_step(optimizer, None, norm="keep")
    for k in range(40):
        step(optimizer, m, k)
        norms_of(matrices(m), None)
    torch.testing.assert_close([p.norm().item() for p in matrices(m)], kept, rtol=1e-6, atol=0)


def test_dims_and_norms_of_each_parameter(route: str) -> None:
    m = model()
    first, second = matrices(m)
    kept, r = norms_of(second, 2), randn((1, 6)).abs()
    optimizer = SGD(m.parameters(), lr=0.1)
    with normalize_after_step([second, first], [2, -1], norm=["keep", 3.0]):
        step(optimizer, m)
    torch.testing.assert_close(norms_of(second, 2), kept)
    assert_rows([first], 3.0, None)
    with normalize_after_step([first], [1], norm=r):
        step(optimizer, m)
    torch.testing.assert_close(norms_of(first, 1), r)
    with normalize_after_step((m[0].weight, first), [0, None], norm=(0.5, "sqrt_numel")):
        step(optimizer, m)  # gains, too, if they are named
    torch.testing.assert_close(m[0].weight.detach().abs(), torch.full((6,), 0.5))
    assert_rows([first], 30**0.5, None)


def test_each_optimizer_has_its_own_parameters(route: str) -> None:
    """Parameters by themselves: after a step of the optimizer that holds them, also of one that is
    made afterwards."""
    m = model()
    first, second = matrices(m)
    one = SGD([first], lr=0.1)
    with normalize_after_step([first, second]):
        two = SGD([second], lr=0.1)
        loss(m).backward()
        before = second.detach().clone()
        one.step()
        assert_rows([first])
        assert torch.equal(second, before)
        before = first.detach().clone()
        two.step()
        assert_rows([second])
        assert torch.equal(first, before)


def test_of_two_optimizers_one_is_watched(route: str) -> None:
    m = model()
    first, second = matrices(m)
    one, two = SGD([first], lr=0.1), SGD([second], lr=0.1)
    normalize_after_step(one)
    loss(m).backward()
    before = second.detach().clone()
    two.step()
    torch.testing.assert_close(second.detach(), before - 0.1 * second.grad)
    one.step()
    assert_rows([first])


def test_a_step_that_a_grad_scaler_skips_is_none() -> None:
    m = model()
    optimizer = SGD(m.parameters(), lr=0.1)
    normalize_after_step(optimizer)
    scaler = torch.amp.GradScaler(here().type, init_scale=4.0)
    before = values(m)
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(loss(m) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        if factor > 1:
            assert all(map(torch.equal, values(m), before))
    assert_rows(matrices(m))


def test_lbfgs(route: str) -> None:
    """The closure runs several times in a step, and the parameters are written after the last."""
    m = model(F64)
    optimizer = torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=4)
    normalize_after_step(optimizer)
    seen = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        seen.append(m[1].weight.detach().norm(dim=1))
        value = loss(m)
        value.backward()
        return value

    optimizer.step(closure)
    assert len(seen) > 1
    assert not torch.allclose(seen[-1], torch.ones(5, dtype=F64))
    assert_rows(matrices(m))


# Its end


@pytest.mark.parametrize("form", ["optimizer", "parameters"])
@pytest.mark.parametrize("way", ["remove", "with"])
def test_its_end(form: str, way: str) -> None:
    m = model()
    optimizer = SGD(m.parameters(), lr=0.1)
    handle = normalize_after_step(optimizer if form == "optimizer" else matrices(m))
    if way == "with":
        with handle:
            step(optimizer, m)
    else:
        step(optimizer, m)
        handle.remove()
        handle.remove()
    assert_rows(matrices(m))
    twin = copy.deepcopy(m)
    plain = SGD(twin.parameters(), lr=0.1)
    step(optimizer, m)
    step(plain, twin)
    assert_same(m, twin)


def test_parameters_are_not_kept_alive() -> None:
    m = model()
    gone = [weakref.ref(p) for p in matrices(m)]
    first = SGD(m.parameters(), lr=0.1)
    other = model()
    optimizer = SGD(other.parameters(), lr=0.1)
    with normalize_after_step([*matrices(m), other[1].weight], norm="keep"):
        kept = norms_of(other[1].weight)
        step(first, m)
        del m, first
        gc.collect()
        assert [p() for p in gone] == [None, None]
        step(optimizer, other)
        torch.testing.assert_close(norms_of(other[1].weight), kept)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_of_an_optimizer_are_as_without_it(copied: Callable) -> None:
    m = model()
    optimizer = AdamW(m.parameters(), lr=0.1)
    handle = normalize_after_step(optimizer)
    step(optimizer, m)
    other = copied(optimizer)
    assert not other._optimizer_step_post_hooks
    torch.testing.assert_close(other.state_dict(), optimizer.state_dict())
    parameters = other.param_groups[0]["params"]
    for p in parameters:
        p.grad = torch.ones_like(p)
    other.step()
    matrix = next(p for p in parameters if p.ndim == 2)
    assert not torch.allclose(matrix.norm(dim=1), torch.ones(5))
    handle.remove()
    fresh = AdamW(m.parameters(), lr=0.3)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.param_groups[0]["lr"] == 0.1
