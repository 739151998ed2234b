"""One weight on the CPU goes to its kernels without the dispatcher, and has an autograd node of its
own: with the bits of the operators on lists, and not where somebody waits in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from wnkernel import functional as F
from wnkernel import native

from ..cases import (
    DTYPES,
    EMPTY_SHAPES,
    LAYOUTS,
    SHAPES,
    layout_dims,
    mixed_dtypes,
    randn,
    randn_g,
    shape_dims,
)
from ..messages import here
from ..reference import bits

pytestmark = [
    pytest.mark.skipif(not native.loaded(), reason=native.load_error()),
    pytest.mark.skipif(here().type != "cpu", reason="other devices have no such path"),
]


def by_function(v: Tensor, g: Tensor, dim: int | None = 0, eps: float = 0.0, out=None) -> Tensor:
    return F.weight_norm(v, g, dim, eps=eps, out_dtype=out)


def by_operator(v: Tensor, g: Tensor, dim: int | None = 0, eps: float = 0.0, out=None) -> Tensor:
    return torch.ops.wnkernel.weight_norm(v, g, -1 if dim is None else dim, eps, out)


def in_a_list(v: Tensor, g: Tensor, dim: int | None = 0, eps: float = 0.0, out=None) -> Tensor:
    return F.weight_norms([v], [g], [dim], eps=[eps], out_dtype=out)[0]


@pytest.fixture(params=[by_function, by_operator])
def weight_norm(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    """The ways to one weight."""
    return request.param


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    for name in ("dtype", "shape", "stride"):
        a, b = getattr(got, name), getattr(want, name)
        assert (a() == b()) if callable(a) else (a == b), name
    assert torch.equal(bits(got), bits(want))


def leaves(v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return v.detach().requires_grad_(), g.detach().requires_grad_()


def pair(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return leaves(randn((5, 6, 7), dtype), randn_g((5, 6, 7), 0, dtype))


def check(
    weight_norm: Callable[..., Tensor],
    v: Tensor,
    g: Tensor,
    grad_w: Tensor,
    dim: int | None,
    eps: float = 0.0,
    out: torch.dtype | None = None,
) -> None:
    """w and its gradients, recorded and not, are those of a list and of both operators on lists."""
    ops, d = torch.ops.wnkernel, [-1 if dim is None else dim]
    w, norm = ops.forward([v], [g], d, [eps], out)
    grads = ops.backward([grad_w], [v], [g], [norm], d, [eps], [1], [1])
    assert_same_bits(weight_norm(v, g, dim, eps, out), w)
    for f in (weight_norm, in_a_list):
        a, b = leaves(v, g)
        again = f(a, b, dim, eps, out)
        assert_same_bits(again, w)
        for got, want in zip(torch.autograd.grad(again, (a, b), grad_w), grads, strict=True):
            assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim"), shape_dims(SHAPES | EMPTY_SHAPES))
def test_bits_of_shapes(weight_norm, shape, dim, dtype):
    v, g, grad_w = randn(shape, dtype), randn_g(shape, dim, dtype), randn(shape, dtype)
    for eps in (0.0, 1.0):
        check(weight_norm, v, g, grad_w, dim, eps)


@pytest.mark.parametrize(
    ("v_dtype", "g_dtype", "out_dtype", "dim"), mixed_dtypes([None, torch.float16, torch.float64])
)
def test_bits_of_mixed_dtypes(weight_norm, v_dtype, g_dtype, out_dtype, dim):
    shape = (5, 6, 7)
    v, g, grad_w = randn(shape, v_dtype), randn_g(shape, dim, g_dtype), randn(shape, out_dtype)
    check(weight_norm, v, g, grad_w.to(out_dtype or v_dtype), dim, 0.0, out_dtype)


@pytest.mark.parametrize(("layout", "dim"), layout_dims())
def test_bits_of_layouts(weight_norm, layout, dim):
    """Of v, of grad_w, of both; and a grad_w of which every stride is 0."""
    shape = LAYOUTS[layout]
    g = randn_g(shape, dim)
    plain, other, repeated = randn(shape), randn(shape, layout=layout), torch.ones(()).expand(shape)
    for v, grad_w in ((other, plain), (plain, other), (other, other), (other, repeated)):
        check(weight_norm, v, g, grad_w, dim)


def test_bits_of_rows_that_leave_the_float_range(weight_norm):
    v, grad_w = randn((6, 40)), randn((6, 40))
    v[0], v[1], v[2], grad_w[3] = 0, v[1] * 1e30, v[2] * 1e-30, float("inf")
    for eps in (0.0, 1e-12):
        check(weight_norm, v, randn_g((6, 40), 0), grad_w, 0, eps)


class Seen(TorchDispatchMode):
    """Calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "wnkernel":
            self.calls.append((func._schema.name.partition("::")[2], args))
        return func(*args, **(kwargs or {}))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


def test_a_mode_sees_the_operators(weight_norm):
    v, g = pair()
    with Seen() as seen:
        w = weight_norm(v, g)
        assert seen.names == ["forward_one"]
        w.sum().backward()
        assert seen.names == ["forward_one", "backward_one"]
        with torch.no_grad():
            weight_norm(v, g)
        assert seen.names == ["forward_one", "backward_one", "weight_norm"]


def test_a_mode_sees_a_backward_alone(weight_norm):
    """Of a forward that it has not seen."""
    v, g = pair()
    w = weight_norm(v, g)
    with Seen() as seen:
        grads = torch.autograd.grad(w, (v, g), torch.ones_like(w), retain_graph=True)
    assert seen.names == ["backward_one"]
    for got, want in zip(grads, torch.autograd.grad(w, (v, g), torch.ones_like(w)), strict=True):
        assert_same_bits(got, want)


def test_a_profiler_sees_the_operators(weight_norm):
    v, g = pair()
    with torch.profiler.profile() as seen:
        weight_norm(v, g).sum().backward()
    names = {event.name for event in seen.events()}
    assert {"wnkernel::forward_one", "wnkernel::backward_one", "WeightNormBackward"} <= names


def test_a_tracer_sees_the_operators(weight_norm):
    def gradients(v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(weight_norm(v, g).sum(), (v, g))

    targets = {node.target for node in make_fx(gradients)(*pair()).graph.nodes}
    ops = torch.ops.wnkernel
    assert {ops.forward_one.default, ops.backward_one.default} <= targets


class Wrapped(Tensor):
    """More than its memory: has none, and says what is done with it."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, calls: list[str]) -> Wrapped:
        layout = {"strides": inner.stride(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, **layout)

    def __init__(self, inner: Tensor, calls: list[str]) -> None:
        self.inner, self.calls = inner, calls

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def inner(t: Wrapped) -> Tensor:
            t.calls.append(func._schema.name)
            return t.inner

        return func(*tree_map_only(Wrapped, inner, args), **(kwargs or {}))


def test_a_subclass_with_a_dispatch_of_its_own(weight_norm):
    v, g = pair()
    calls: list[str] = []
    w = weight_norm(Wrapped(v.detach(), calls), g)
    assert calls == ["wnkernel::forward_one"]
    assert_same_bits(w, weight_norm(v, g))
    w.backward(torch.ones_like(w))
    assert calls[1:] == ["wnkernel::backward_one"]


def test_a_gradient_with_a_dispatch_of_its_own(weight_norm):
    v, g = pair()
    w, calls, grad_w = weight_norm(v, g), [], randn((5, 6, 7))
    got = torch.autograd.grad(w, (v, g), Wrapped(grad_w, calls))
    assert "wnkernel::backward_one" in calls
    for a, b in zip(got, torch.autograd.grad(w, (v, g), grad_w), strict=True):
        assert_same_bits(a, b)


class Plain(Tensor):
    """Of no further meaning."""


def test_a_subclass(weight_norm):
    v, g = pair()
    w = weight_norm(v.as_subclass(Plain), g)
    assert type(w) is Plain
    assert_same_bits(w.as_subclass(Tensor), weight_norm(v, g))
    w.backward(randn((5, 6, 7)))
    assert v.grad is not None


def test_negated_views(weight_norm):
    """Memory that holds the opposite of what a tensor is."""
    v, g = pair()
    w, grad_w = weight_norm(v, g), randn((5, 6, 7))
    assert_same_bits(weight_norm(torch._neg_view(v.detach()), g), weight_norm(-v.detach(), g))
    (got,) = torch.autograd.grad(w, v, torch._neg_view(grad_w))
    assert_same_bits(got, torch.autograd.grad(w, v, -grad_w)[0])


def test_under_autocast(weight_norm):
    v, g = pair()
    want = weight_norm(v, g)
    with torch.autocast("cpu", torch.bfloat16):
        w = weight_norm(v, g)
        assert_same_bits(w, want)
        (got,) = torch.autograd.grad(w.sum(), v)
    assert_same_bits(got, torch.autograd.grad(want.sum(), v)[0])


def test_in_inference_mode(weight_norm):
    v, g = pair()
    with torch.inference_mode():
        w = weight_norm(v, g)
        made_there = v.clone()
    assert w.is_inference()
    assert not w.requires_grad
    assert_same_bits(w, weight_norm(v, g))
    (got,) = torch.autograd.grad(weight_norm(made_there, g).sum(), g)
    assert_same_bits(got, torch.autograd.grad(weight_norm(v, g).sum(), g)[0])
