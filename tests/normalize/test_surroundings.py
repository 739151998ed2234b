"""normalize_ among what else looks at tensors: autograd, groups, modes, transforms, subclasses."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import wnkernel
from wnkernel import constants, normalize_, normalizing, norms_of
from wnkernel.backends import BACKENDS

from .. import reference
from ..cases import randn
from ..groups import Computed, assert_same_models, twins, weights
from ..threads import together
from ..torch_modes import Dispatches, Functions, deterministic
from .expected import assert_normal, assert_normalizes, assert_norms, scaled

SHAPE = (6, 5)


def parameters(model: torch.nn.Module, name: str) -> list[Tensor]:
    """Of all layers, those of one name: original0 is g, original1 is v."""
    return [p for path, p in model.named_parameters() if path.endswith(f".{name}")]


# Autograd


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "gaps", "cut"])
def test_the_version_goes_up_by_one(route: str, layout: str) -> None:
    """For each tensor of a list, with elements and without."""
    tensors = [randn((7, 5, 3), layout=layout), randn(SHAPE), torch.empty(0, 3), randn((4,))]
    versions = [t._version for t in tensors]
    for count in (1, 2):
        normalize_(tensors, [0, 1, None, 0])
        assert [t._version for t in tensors] == [version + count for version in versions]


def test_autograd_sees_the_write(route: str) -> None:
    x, a = randn(SHAPE), randn(SHAPE).requires_grad_()
    y = (a * x).sum()
    normalize_([randn((2, 2)), x])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_parameters_are_written_in_no_grad(route: str) -> None:
    p = torch.nn.Parameter(randn(SHAPE))
    before = p.detach().clone()
    with torch.no_grad():
        normalize_([p], norm=[torch.ones(6, 1, requires_grad=True)])
    assert p.requires_grad
    assert p.is_leaf
    assert_normal(p.detach(), before)
    found = norms_of(p)
    assert not found.requires_grad
    p.square().sum().backward()
    assert torch.equal(p.grad, 2 * p.detach())


def test_parts_of_a_parameter(route: str) -> None:
    """As q, k and v in one matrix."""
    p = torch.nn.Parameter(randn((6, 5)))
    before = p.detach().clone()
    with torch.no_grad():
        normalize_(p.chunk(3), dim=[0, 1, None])
    for part, old, dim in zip(p.detach().chunk(3), before.chunk(3), [0, 1, None], strict=True):
        assert_normal(part, old, dim)


# Groups and threads


def test_a_group_computes_anew(backend: str, computed: Computed) -> None:
    """With ``reuse="version"``, too: w is the same but for its last bits, and is not the same
    tensor."""
    model, twin, _ = twins("version")
    model()
    before = weights(model)
    computed.take()
    model()
    assert computed.take() == ([], 0)
    with torch.no_grad():
        for m in (model, twin):
            normalize_(parameters(m, "original1"), None, norm=3.0)
    model()
    launches, _ = computed.take()
    assert sum(launches) == len(before)
    assert_same_models(model, twin)
    for name, w in weights(model).items():
        torch.testing.assert_close(w, before[name])


def test_a_group_sees_that_g_was_written(backend: str) -> None:
    """The norm of w is that of g."""
    model, twin, _ = twins("version")
    for m in (model, twin):
        m()
        with torch.no_grad():
            normalize_((g.view(-1) for g in parameters(m, "original0")), None, norm=2.0)
    assert_same_models(model, twin)
    for w in weights(model).values():
        torch.testing.assert_close(w.norm().float(), torch.tensor(2.0), rtol=0.02, atol=0)


def test_two_threads_at_once(route: str) -> None:
    lists = [[randn((40 + k, 300)) for k in range(n)] for n in (5, 7)]
    before = [[x.clone() for x in xs] for xs in lists]

    def run(xs: list[Tensor], name: str = route) -> None:
        with wnkernel.use_backend(name):
            for r in (2.0, 3.0, 1.0):
                normalize_(xs, norm=r)

    together(*(lambda xs=xs: run(xs) for xs in lists))
    for xs, olds in zip(lists, before, strict=True):
        for x, old in zip(xs, olds, strict=True):
            torch.testing.assert_close(x.double(), scaled(old, 0, 1.0).value, rtol=2e-6, atol=0)


# Backends


@pytest.mark.parametrize("name", ["eager", "cpu"])
def test_the_backend_that_was_asked_for_computes(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """ "eager" is called from Python, and what is compiled is not."""
    if reasons := BACKENDS[name].reasons(torch.empty(0)):
        pytest.skip(f"{name}: {'; '.join(reasons)}")
    eager, calls = BACKENDS["eager"], []
    run = eager.normalize_
    monkeypatch.setattr(eager, "normalize_", lambda problems: calls.append(1) or run(problems))
    x = randn(SHAPE)
    before = x.clone()
    with wnkernel.use_backend(name):
        normalize_(x)
    assert len(calls) == (name == "eager")
    assert_normal(x, before)


def test_constants_are_made_once_and_do_not_pile_up(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "_kept", {})
    monkeypatch.setattr(constants, "KEPT", 2)
    x = randn(SHAPE)
    for r in (1.0, 1.0, 2.0, 2.0):
        assert_normalizes(x, 0, r)
    kept = dict(constants._kept)
    assert len(kept) == 2
    assert_normalizes(x, 0, 1.0)
    assert all(constants._kept[key] is t for key, t in kept.items())
    assert_normalizes(x, 0, 3.0)
    assert len(constants._kept) == 1
    assert_normalizes(x.to(torch.float64), 0, 3.0)
    assert_normalizes(x.t().contiguous(), 0, 3.0)


# Modes


@pytest.mark.parametrize(
    "mode",
    [
        Functions,
        Dispatches,
        deterministic,
        lambda: torch.device("meta"),
        lambda: torch.autocast(torch.empty(0).device.type, torch.bfloat16),
        lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
        lambda: torch.autograd.forward_ad.dual_level(),
    ],
)
def test_modes_change_nothing(route: str, mode: Callable[[], Any]) -> None:
    xs = [randn(SHAPE), randn((4, 3), torch.bfloat16)]
    before, version = [x.clone() for x in xs], xs[0]._version
    with mode():
        found = normalize_(xs, norm="sqrt_numel", return_norms=True)
        again = norms_of(xs)
    for x, b, n, m in zip(xs, before, found, again, strict=True):
        assert_normal(x, b, r=x.shape[1] ** 0.5)
        assert_norms(n, b, 0)
        assert_norms(m, x, 0)
    assert xs[0]._version == version + 1


def test_the_default_dtype_does_not_matter(route: str) -> None:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert_normalizes(randn(SHAPE, torch.float32), 0, 2.0)
        assert_normalizes(randn(SHAPE, torch.float16), None, "sqrt_numel", r=30**0.5)
    finally:
        torch.set_default_dtype(before)


def test_a_function_mode_sees_one_call(route: str) -> None:
    class Count(TorchFunctionMode):
        calls = 0

        def __torch_function__(
            self, func: Callable, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.calls += func is normalize_
            return func(*args, **(kwargs or {}))

    xs = [randn(SHAPE), randn((3, 4))]
    before = [x.clone() for x in xs]
    with Count() as count:
        found = normalize_(iter(xs), [1, None], norm=[2.0, 3.0], eps=3.0, return_norms=True)
    assert count.calls == 1
    for x, b, dim, r, n in zip(xs, before, [1, None], [2.0, 3.0], found, strict=True):
        assert_normal(x, b, dim, r, 3.0)
        assert_norms(n, b, dim)


def test_inference_mode(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept there, constants and norms, serves outside, too."""
    monkeypatch.setattr(constants, "_kept", {})
    x = randn(SHAPE)
    with torch.inference_mode():
        y = randn(SHAPE)
        before = [x.clone(), y.clone()]
        norms_of(x)
        normalize_([x, y], norm=2.5)
    assert_normal(x, before[0], r=2.5)
    assert_normal(y, before[1], r=2.5)
    assert_normalizes(randn(SHAPE), 0, 2.5)
    normalize_(x, norm="keep")
    torch.testing.assert_close(norms_of(x), reference.norm(before[0], 0).float())


# What norms_of remembers


def test_copies_have_no_norms_to_keep() -> None:
    x = randn(SHAPE)
    norms_of(x)
    for other in (copy.deepcopy(x), copy.copy(x), x.clone(), x.detach(), x[:], x.to(torch.float64)):
        with pytest.raises(ValueError, match="'keep' expects that norms_of was called before"):
            normalize_(other, norm="keep")
    assert_normalizes(x, 0, "keep", r=reference.norm(x, 0))


def test_a_tensor_that_is_gone_is_forgotten() -> None:
    gc.collect()
    before = len(normalizing._found)
    x, y = randn(SHAPE), randn(SHAPE)
    norms_of([x, y])
    norms_of(x, None)
    assert len(normalizing._found) == before + 2
    del x
    gc.collect()
    assert len(normalizing._found) == before + 1
    assert_normalizes(y, 0, "keep", r=reference.norm(y, 0))
