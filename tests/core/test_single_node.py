"""The autograd node of one weight on the CPU: what torch's own nodes do, this one does as well."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad

from wnkernel import functional as F
from wnkernel import native

from ..cases import randn, randn_g
from ..processes import python
from .test_single_path import Seen, assert_same_bits, in_a_list, leaves, pair, weight_norm

__all__ = ["weight_norm"]

pytestmark = pytest.mark.skipif(not native.loaded(), reason=native.load_error())

SHAPE = (5, 6, 7)


def test_name_and_edges(weight_norm):
    v, g = pair()
    node = weight_norm(v, g).grad_fn
    assert node.name() == "WeightNormBackward"
    edges = [(edge.variable, index) for edge, index in node.next_functions]
    assert len(edges) == 2
    assert edges[0][0] is v
    assert edges[1][0] is g
    assert [index for _, index in edges] == [0, 0]
    (to_v, _), (to_g, _) = weight_norm(v, g.detach()).grad_fn.next_functions
    assert to_v.variable is v
    assert to_g is None
    u = v.sin()
    assert weight_norm(u, g).grad_fn.next_functions[0][0] is u.grad_fn


@pytest.mark.parametrize("grad", [True, False])
def test_without_gradients_there_is_none(weight_norm, grad):
    v, g = pair()
    if grad:
        w = weight_norm(v.detach(), g.detach())
    else:
        with torch.no_grad():
            w = weight_norm(v, g)
    assert w.grad_fn is None
    assert not w.requires_grad


@pytest.mark.parametrize("wanted", ["v", "g"])
@pytest.mark.parametrize("how", ["the other is frozen", "asked for alone"])
def test_one_gradient(weight_norm, wanted, how):
    """Of the right bits, and the other is not computed."""
    v, g = pair()
    grad_w, k = randn(SHAPE), "vg".index(wanted)
    want = torch.autograd.grad(in_a_list(v, g), (v, g), grad_w)[k]
    if how == "the other is frozen":
        (g if wanted == "v" else v).requires_grad_(False)
    w = weight_norm(v, g)
    assert_same_bits(torch.autograd.grad(w, (v, g)[k], grad_w, retain_graph=True)[0], want)
    with Seen() as seen:
        torch.autograd.grad(w, (v, g)[k], grad_w)
    ((name, arguments),) = seen.calls
    assert name == "backward_one"
    assert list(arguments[6:8]) == [wanted == "v", wanted == "g"]


class Nothing(torch.autograd.Function):
    """From which no gradient comes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_weight_that_was_not_used(weight_norm, create_graph):
    v, g = pair()
    w = weight_norm(v, g)
    options = {"create_graph": create_graph, "allow_unused": True}
    assert torch.autograd.grad(Nothing.apply(w).sum(), (v, g), **options) == (None, None)
    Nothing.apply(w).sum().backward()
    assert v.grad is None
    assert g.grad is None
    w.sum().backward()  # the node runs again
    assert v.grad is not None
    assert g.grad is not None


@pytest.mark.parametrize("retain", [False, True])
def test_backward_twice(weight_norm, retain):
    v, g = pair()
    w, grad_w = weight_norm(v, g), randn(SHAPE)
    w.backward(grad_w, retain_graph=retain)
    first = v.grad.clone(), g.grad.clone()
    w.backward(grad_w, retain_graph=retain)
    for got, once in zip((v.grad, g.grad), first, strict=True):
        assert_same_bits(got, 2 * once)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_second_derivatives_have_the_bits_of_a_list(weight_norm, dim):
    tensors = randn(SHAPE), randn_g(SHAPE, dim), randn(SHAPE)
    along = randn(SHAPE), randn_g(SHAPE, dim)

    def second(f):
        v, g, grad_w = (t.clone().requires_grad_() for t in tensors)
        first = torch.autograd.grad(f(v, g, dim), (v, g), grad_w, create_graph=True)
        return [*first, *torch.autograd.grad(first, (v, g, grad_w), along)]

    for got, want in zip(second(weight_norm), second(in_a_list), strict=True):
        assert_same_bits(got, want)


def test_numerical_derivatives(weight_norm):
    inputs = leaves(randn((3, 4), torch.float64), randn_g((3, 4), 0, torch.float64))
    assert torch.autograd.gradcheck(weight_norm, inputs)
    assert torch.autograd.gradgradcheck(weight_norm, inputs)


@pytest.mark.parametrize("changed", [0, 1])
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_change_in_place_is_an_error(weight_norm, changed, create_graph):
    """In the words of a list, which are torch's."""
    said = []
    for f in (weight_norm, in_a_list):
        inputs = pair()
        w = f(*inputs)
        with torch.no_grad():
            inputs[changed].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation: ") as e:
            torch.autograd.grad(w.sum(), inputs, create_graph=create_graph)
        said.append(str(e.value).partition("\n")[0])
    assert said[0] == said[1]


def test_w_itself_may_be_changed_in_place(weight_norm):
    v, g = pair()
    grad_w = randn(SHAPE)
    want = torch.autograd.grad(weight_norm(v, g), (v, g), 2 * grad_w)
    w = weight_norm(v, g)
    w.mul_(2)
    w[0].add_(1)
    for got, right in zip(torch.autograd.grad(w, (v, g), grad_w), want, strict=True):
        assert_same_bits(got, right)


def test_hooks_run(weight_norm):
    v, g = pair()
    w, grad_w, seen = weight_norm(v, g), randn(SHAPE), {}
    want = torch.autograd.grad(w, (v, g), 4 * grad_w)
    w.register_hook(lambda grad: 2 * grad)
    w.retain_grad()
    w.grad_fn.register_prehook(lambda grads: (2 * grads[0],))
    w.grad_fn.register_hook(lambda of_inputs, of_w: seen.update(inputs=of_inputs, w=of_w))
    v.register_post_accumulate_grad_hook(lambda t: seen.update(v=t.grad))
    w.backward(grad_w)
    assert torch.equal(w.grad, 2 * grad_w)
    assert torch.equal(seen["w"][0], 4 * grad_w)
    assert seen["v"] is v.grad
    for name, tensors in (("inputs", seen["inputs"]), ("leaves", (v.grad, g.grad))):
        assert len(tensors) == 2, name
        for got, right in zip(tensors, want, strict=True):
            assert_same_bits(got, right)


def in_threads(count: int, work) -> None:
    """Runs it in several threads at a time; what it raises is raised here."""
    errors = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("count", [1, 4])
def test_backward_in_other_threads(weight_norm, count):
    """All of one node."""
    v, g = pair()
    w, grad_w = weight_norm(v, g), randn(SHAPE)
    want = torch.autograd.grad(w, (v, g), grad_w)

    def work() -> None:
        for _ in range(20):
            for got, right in zip(torch.autograd.grad(w, (v, g), grad_w), want, strict=True):
                assert_same_bits(got, right)

    in_threads(count, work)


@pytest.mark.parametrize("create_graph", [False, True])
def test_what_is_dropped_is_freed_at_once(weight_norm, create_graph):
    v, g = pair()
    w = weight_norm(v, g)
    if create_graph:
        grads = torch.autograd.grad(w, (v, g), randn(SHAPE).requires_grad_(), create_graph=True)
    else:
        grads = torch.autograd.grad(w, (v, g), randn(SHAPE))
    alive = [weakref.ref(t) for t in (v, g, w, *grads)]
    gc.disable()
    try:
        del w
        assert alive[2]() is None
        del v, g, grads
        assert not any(t() is not None for t in alive)
    finally:
        gc.enable()


def test_v_and_g_live_as_long_as_w(weight_norm):
    """Their hooks run although nobody else holds them."""
    seen = []
    v, g = pair()
    for t in (v, g):
        t.register_post_accumulate_grad_hook(lambda t: seen.append(t.grad.shape))
    w = weight_norm(v, g)
    del v, g, t
    w.sum().backward()
    assert sorted(seen) == [(5, 1, 1), SHAPE]


def test_a_long_chain_is_freed_without_recursion():
    """Or the stack ends before the chain does."""
    code = """
import torch
from wnkernel import functional as F
w, g = torch.ones(1, 1, requires_grad=True), torch.ones(1, 1, requires_grad=True)
for _ in range(100_000):
    w = F.weight_norm(w, g)
w.sum().backward()
del w
print("alive", g.grad.item())
"""
    result = python("-c", code)
    assert result.stdout.startswith("alive "), result.stderr


@pytest.mark.parametrize("create_graph", [False, True])
def test_tangents_of_a_gradient_are_kept(create_graph):
    """A dual tensor shows in no dispatch key, and without create_graph nothing is recorded."""
    v, g = pair()
    grad_w, tangent = randn(SHAPE), randn(SHAPE)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(grad_w, tangent)
        grads = torch.autograd.grad(F.weight_norm(v, g), (v, g), dual, create_graph=create_graph)
        tangents = [forward_ad.unpack_dual(grad).tangent for grad in grads]
    want = torch.autograd.grad(F.weight_norm(v, g), (v, g), tangent)  # it is linear in grad_w
    for got, expected in zip(tangents, want, strict=True):
        torch.testing.assert_close(got.detach(), expected)


def test_a_norm_without_memory_is_none_for_the_kernels():
    """A mode may have wrapped what a forward of real tensors gave."""
    v, g = pair()
    with FakeTensorMode(allow_non_fake_inputs=True):
        w = F.weight_norm(v, g)
    grads = torch.autograd.grad(w, (v, g), torch.ones(v.shape))
    assert [type(grad) for grad in grads] == [FakeTensor, FakeTensor]


def test_anomalies_are_found(weight_norm):
    v, g = pair()
    with torch.autograd.set_detect_anomaly(True):
        got = torch.autograd.grad(weight_norm(v, g).sum(), (v, g))
        spoiled = v.detach().clone()
        spoiled[1] = 0
        w = weight_norm(spoiled.requires_grad_(), g)
        with (
            pytest.warns(UserWarning, match="Error detected in WeightNormBackward") as warned,
            pytest.raises(
                RuntimeError, match="'WeightNormBackward' returned nan values in its 0th"
            ),
        ):
            w.sum().backward()
    assert "w = weight_norm(spoiled.requires_grad_(), g)" in str(warned[0].message)
    for a, b in zip(got, torch.autograd.grad(in_a_list(v, g).sum(), (v, g)), strict=True):
        assert_same_bits(a, b)
