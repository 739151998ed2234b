"""First and second derivatives against the float64 oracle, and what the node must not do."""

from __future__ import annotations

import contextlib
import functools
import gc

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import wnkernel
from wnkernel import functional as F

from .. import reference
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

# The middle of the grid of test_values.py: what takes another path in a backward.
GRADIENT_SHAPES = {
    name: SHAPES[name]
    for name in ("odd", "vector", "single", "one_row", "one_column", "conv2d", "long_rows")
}


def check(v, g, grad_w, dim, eps=0.0, out_dtype=None):
    v, g = v.detach().requires_grad_(), g.detach().requires_grad_()
    w = F.weight_norm(v, g, dim, eps=eps, out_dtype=out_dtype)
    grad_v, grad_g = torch.autograd.grad(w, (v, g), grad_w)
    assert (grad_v.dtype, grad_g.dtype) == (v.dtype, g.dtype)
    want_v, want_g = reference.backward(v, g, grad_w, dim, eps)
    reference.assert_close("grad_v", grad_v, want_v)
    reference.assert_close("grad_g", grad_g, want_g)
    return grad_v, grad_g


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim"), shape_dims(GRADIENT_SHAPES))
def test_shapes(route, shape, dim, dtype):
    check(randn(shape, dtype), randn_g(shape, dim, dtype), randn(shape, dtype), dim)


@pytest.mark.parametrize(("shape", "dim"), shape_dims(EMPTY_SHAPES))
def test_empty(route, shape, dim):
    v, g = randn(shape).requires_grad_(), randn_g(shape, dim).requires_grad_()
    F.weight_norm(v, g, dim).backward(randn(shape))
    assert v.grad.shape == v.shape
    assert torch.equal(g.grad, torch.zeros_like(g))  # sums over nothing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("layout", "dim"), layout_dims())
def test_layouts_of_v(route, layout, dim, dtype):
    shape = LAYOUTS[layout]
    v, g = randn(shape, dtype, layout), randn_g(shape, dim, dtype)
    check(v, g, randn(shape, dtype, layout), dim)  # grad_w in v's order, and in another
    check(v, g, randn(shape, dtype), dim)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("layout", "dim"), layout_dims())
def test_layouts_of_grad_w(route, layout, dim, dtype):
    """v is contiguous: conv2d with a channels_last input sends such gradients."""
    shape = LAYOUTS[layout]
    check(randn(shape, dtype), randn_g(shape, dim, dtype), randn(shape, dtype, layout), dim)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("dim", [0, 1, 2, None])
def test_expanded_scalar_grad_w(route, dim, layout):
    """What ``w.sum().backward()`` sends: every stride is 0."""
    shape = (7, 5, 3)
    check(randn(shape, layout=layout), randn_g(shape, dim), torch.tensor(0.5).expand(shape), dim)


@pytest.mark.parametrize(
    ("v_dtype", "g_dtype", "out_dtype", "dim"), mixed_dtypes([None, torch.float16, torch.float32])
)
def test_mixed_dtypes(route, dim, v_dtype, g_dtype, out_dtype):
    shape = (5, 6, 7)
    grad_w = randn(shape, out_dtype or v_dtype)
    check(randn(shape, v_dtype), randn_g(shape, dim, g_dtype), grad_w, dim, out_dtype=out_dtype)


@pytest.mark.parametrize("size", [1e30, 1e-30])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_range(route, dim, size):
    if route == "eager" and dim != 1:
        pytest.skip("eager follows torch's fused kernel there, whose squares leave the range")
    v = randn((4, 5, 6))
    v.select(dim, 2).mul_(size)
    check(v, randn_g((4, 5, 6), dim), randn((4, 5, 6)), dim)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1, 2, None])
def test_zero_row_with_eps_has_finite_gradients(route, dim, dtype):
    v, g = randn((4, 5, 6), dtype), randn_g((4, 5, 6), dim, dtype)
    (v if dim is None else v.select(dim, 2)).zero_()
    check(v, g, randn((4, 5, 6), dtype), dim, eps=0.125)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_eps_that_clamps_some_rows(route, dim):
    v, g = randn((4, 5, 6)), randn_g((4, 5, 6), dim)
    check(v, g, randn((4, 5, 6)), dim, eps=float(reference.norm(v, dim).mean()) * 1.001)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_zero_row_without_eps_spoils_no_other(route, dim):
    v, g, grad_w = randn((4, 5, 6)), randn_g((4, 5, 6), dim), randn((4, 5, 6))
    clean_v, clean_g = check(v, g, grad_w, dim)
    v.select(dim, 2).zero_()
    v.requires_grad_(), g.requires_grad_()
    grad_v, grad_g = torch.autograd.grad(F.weight_norm(v, g, dim), (v, g), grad_w)
    assert grad_v.select(dim, 2).isnan().all()
    for row in (0, 1, 3):
        assert torch.equal(grad_v.select(dim, row), clean_v.select(dim, row))
        assert torch.equal(grad_g.select(dim, row), clean_g.select(dim, row))


# eps: off, on but touching nothing, clamping the rows below the mean norm.
@pytest.mark.parametrize(
    ("layout", "eps"), [("contiguous", "zero"), ("contiguous", "small"), ("transposed", "clamps")]
)
@pytest.mark.parametrize("dim", [0, 1, 2, None])
def test_gradcheck(route, dim, layout, eps):
    shape = (3, 4, 2)
    v = randn(shape, torch.float64, layout)
    g = randn_g(shape, dim, torch.float64)
    # Norms 0.5, 1, 1.5, ...: no finite difference crosses the bound of 1.2.
    sizes = torch.arange(1, g.numel() + 1, dtype=torch.float64).view(g.shape) / 2
    v = (v * (sizes / reference.norm(v, dim))).requires_grad_()
    g.requires_grad_()
    bound = {"zero": 0.0, "small": 1e-3, "clamps": 1.2}[eps]
    fast = route == "triton"  # the interpreter takes 15 ms for each of the many evaluations
    for numerical_check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        f = functools.partial(F.weight_norm, dim=dim, eps=bound)
        assert numerical_check(f, (v, g), fast_mode=fast)


@pytest.mark.parametrize("dim", [0, 1, 2, None])
def test_third_order(route, dim):
    v = randn((2, 3, 2), torch.float64).requires_grad_()
    g = randn_g((2, 3, 2), dim, torch.float64).requires_grad_()
    grad_w = randn((2, 3, 2), torch.float64).requires_grad_()

    def first_derivative(v, g, grad_w):
        return torch.autograd.grad(F.weight_norm(v, g, dim), (v, g), grad_w, create_graph=True)

    fast = route == "triton"  # as in test_gradcheck
    assert torch.autograd.gradgradcheck(first_derivative, (v, g, grad_w), fast_mode=fast)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [0, 1, 2, None])
def test_second_order_against_oracle(route, dim, dtype):
    """gradgradcheck sees float64 only; a penalty on the gradients of v and g in the others."""
    shape = (5, 6, 7)
    leaves = [randn(shape, dtype), randn_g(shape, dim, dtype), randn(shape, dtype)]
    along = randn(shape, dtype), randn_g(shape, dim, dtype)

    def second(weight_norm, v, g, grad_w, *along):
        first = torch.autograd.grad(weight_norm(v, g, dim), (v, g), grad_w, create_graph=True)
        return torch.autograd.grad(first, (v, g, grad_w), along)

    got = second(F.weight_norm, *(t.requires_grad_() for t in leaves), *along)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    want = second(reference.weight_norm, *wide, *(t.double() for t in along))
    for name, a, b in zip(("v", "g", "grad_w"), got, want, strict=True):
        assert a.dtype == dtype
        # Each is a sum of about four terms of the size of the largest element.
        scale = 4 * b.abs().max().expand_as(b)
        expected = reference.Expected(b, scale, torch.Size(shape).numel(), torch.float32)
        reference.assert_close(f"second order, {name}", a, expected)


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("frozen", ["v", "g"])
def test_frozen(route, frozen, dim):
    v, g, grad_w = randn((5, 6, 7)), randn_g((5, 6, 7), dim), randn((5, 6, 7))
    want_v, want_g = reference.backward(v, g, grad_w, dim)
    v.requires_grad_(frozen != "v"), g.requires_grad_(frozen != "g")
    F.weight_norm(v, g, dim).backward(grad_w)
    if frozen == "v":
        assert v.grad is None
        reference.assert_close("grad_g", g.grad, want_g)
    else:
        assert g.grad is None
        reference.assert_close("grad_v", v.grad, want_v)


def test_no_gradient_wanted(route):
    v, g = randn((5, 6)), randn_g((5, 6), 0)
    assert not F.weight_norm(v, g).requires_grad
    with torch.no_grad():
        assert not F.weight_norm(v.requires_grad_(), g.requires_grad_()).requires_grad
    with torch.inference_mode():
        w = F.weight_norm(v, g)
    assert w.is_inference()


@pytest.mark.parametrize("dim", [0, 1, None])
def test_backward_runs_twice(route, dim):
    """Without retain_graph, as the node holds no saved tensors that could be freed."""
    v = randn((5, 6, 7)).requires_grad_()
    g = randn_g((5, 6, 7), dim).requires_grad_()
    grad_w = randn((5, 6, 7))
    w = F.weight_norm(v, g, dim)
    first = torch.autograd.grad(w, (v, g), grad_w)
    second = torch.autograd.grad(w, (v, g), grad_w)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("changed", ["v", "g"])
def test_change_before_backward_raises(route, changed, dim):
    v = randn((5, 6, 7)).requires_grad_()
    g = randn_g((5, 6, 7), dim).requires_grad_()
    w = F.weight_norm(v, g, dim)
    with torch.no_grad():
        (v if changed == "v" else g).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        w.sum().backward()


@pytest.mark.parametrize("changed", ["v", "g", "grad_w"])
def test_change_before_second_backward_raises(route, changed):
    tensors = {"v": randn((5, 6)), "g": randn_g((5, 6), 0), "grad_w": randn((5, 6))}
    v, g, grad_w = (t.requires_grad_() for t in tensors.values())
    grads = torch.autograd.grad(F.weight_norm(v, g), (v, g), grad_w, create_graph=True)
    with torch.no_grad():
        tensors[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(grads, (v, g, grad_w), [torch.ones_like(t) for t in grads])


@pytest.mark.parametrize("dim", [0, 1, None])
def test_no_saved_tensors(route, dim):
    """Activation checkpointing counts them and offload hooks move them: there are none to see."""
    packed = []
    v = randn((5, 6, 7)).requires_grad_()
    g = randn_g((5, 6, 7), dim).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(packed.append, lambda _: None):
        w = F.weight_norm(v, g, dim)
        torch.autograd.grad(w, (v, g), torch.ones_like(w), create_graph=True)
    assert not packed


@pytest.mark.parametrize("dim", [0, 1, None])
def test_result_is_not_kept(route, dim):
    """A node that held its own output would keep a model's weights alive until a gc run."""
    v = randn((5, 6, 7)).requires_grad_()
    w = F.weight_norm(v, randn_g((5, 6, 7), dim).requires_grad_(), dim)
    storage = StorageWeakRef(w.untyped_storage())
    gc.disable()
    try:
        del w
        assert storage.expired()
    finally:
        gc.enable()


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(route, use_reentrant, dim):
    layer = wnkernel.weight_norm(nn.Conv1d(3, 4, 3), dim=dim)
    block = nn.Sequential(layer, nn.Tanh(), wnkernel.weight_norm(nn.Conv1d(4, 2, 1), dim=dim))
    x = torch.randn(2, 3, 8, requires_grad=True)

    def grads(y):
        block.zero_grad()
        y.square().sum().backward()
        return [p.grad.clone() for p in block.parameters()]

    plain = grads(block(x))
    checkpointed = grads(checkpoint(block, x, use_reentrant=use_reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


@pytest.mark.parametrize(
    ("shape", "dim"), [((6, 40), 0), ((6, 40), 1), ((5, 4, 7), 1), ((120, 100, 3), 2)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_without_a_gradient(backend, shape, dim, dtype):
    """A convolution tap that only ever meets padding has a row of zeros in grad_w."""
    v, g = randn(shape, dtype).requires_grad_(), randn_g(shape, dim, dtype).requires_grad_()
    grad_w = randn(shape, dtype)
    grad_w.select(dim, 1).zero_()
    grad_v, grad_g = torch.autograd.grad(F.weight_norm(v, g, dim), (v, g), grad_w)
    assert not grad_v.select(dim, 1).any()
    assert not grad_g.select(dim, 1).any()
    for name, got, expected in zip(
        ("grad_v", "grad_g"), (grad_v, grad_g), reference.backward(v, g, grad_w, dim), strict=True
    ):
        reference.assert_close(name, got, expected)


def test_sparse_gradients(route):
    """As of ``nn.Embedding(sparse=True)``: those of v are dense in any case."""
    rows = torch.tensor([3, 0, 3])
    layers = [wnkernel.weight_norm(nn.Embedding(5, 4, sparse=sparse)) for sparse in (True, False)]
    layers[1].load_state_dict(layers[0].state_dict())
    model = nn.ModuleList(layers)
    grads = []
    for fused in (False, True):
        if fused:
            group = wnkernel.fuse(model)
        with group.scope() if fused else contextlib.nullcontext():
            y = torch.stack([layer(rows) for layer in layers])
        for layer in layers:
            loss = y.square().sum()
            grads.append(torch.autograd.grad(loss, layer.parameters(), retain_graph=True))
    for grad_g, grad_v in grads[1:]:
        assert torch.equal(grad_g, grads[0][0])
        assert torch.equal(grad_v, grads[0][1])
