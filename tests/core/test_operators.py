"""``torch.ops.wnkernel``: torch's own checks of every operator, fakes, and lists."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import wnkernel
from wnkernel import functional as F

from .. import reference
from ..cases import DTYPES, LAYOUTS, empty, g_shape, layout_dims, randn, randn_g
from ..operators import arguments, halves, lists


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1, 2, -2, None])
def test_opcheck_weight_norm(compiled_backend, ops, dim, dtype, grad):
    torch.library.opcheck(ops.weight_norm.default, arguments(dim, dtype, grad=grad))


@pytest.mark.parametrize(
    "options", [{"eps": 0.5}, {"out_dtype": torch.bfloat16}, {"out_dtype": torch.float64}], ids=str
)
def test_opcheck_weight_norm_options(compiled_backend, ops, options):
    torch.library.opcheck(ops.weight_norm.default, arguments(0, grad=True), options)


@pytest.mark.parametrize(("layout", "dim"), layout_dims())
def test_opcheck_layouts(compiled_backend, ops, layout, dim):
    """The fakes promise strides too: torch.compile allocates by them."""
    tensors = arguments(dim, shape=LAYOUTS[layout], layout=layout)
    torch.library.opcheck(ops.weight_norm.default, tensors)
    torch.library.opcheck(ops.backward.default, (*lists(tensors), [True], [True]))


def test_opcheck_transposed_with_gaps(compiled_backend, ops):
    v = torch.randn(4, 6, 10)[..., ::2].permute(2, 0, 1)
    torch.library.opcheck(ops.weight_norm.default, (v, randn_g(tuple(v.shape), 0), 0))


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_forward(compiled_backend, ops, grad):
    problems = [arguments(d, grad=grad) for d in (0, 1, 2, None)]
    v, g, dim = (list(column) for column in zip(*problems, strict=True))
    torch.library.opcheck(ops.forward.default, (v, g, dim, [0.0] * 4))
    torch.library.opcheck(ops.forward.default, (v, g, dim, [0.0] * 4, torch.bfloat16))


@pytest.mark.parametrize("need_g", [False, True])
@pytest.mark.parametrize("need_v", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_backward(compiled_backend, ops, grad, need_v, need_g):
    problems = [arguments(d, grad=grad) for d in (0, 1, None)]
    columns = lists(*problems)
    torch.library.opcheck(ops.backward.default, (*columns, [need_v] * 3, [need_g] * 3))


def test_lists_of_any_length(compiled_backend, ops):
    """From 1 to past every small-vector size; dims, dtypes and layouts mixed."""
    for count in (1, 2, 3, 4, 5, 8, 9, 33):
        problems = [
            arguments((0, 1, 2, None)[k % 4], DTYPES[k % 4], (3, 4 + k, 5), grad=True)
            for k in range(count)
        ]
        v, g, dim = (list(column) for column in zip(*problems, strict=True))
        grad_w = [torch.randn_like(t) for t in v]
        w, norm = halves(ops.forward(v, g, dim, [0.0] * count))
        torch.autograd.backward(w, grad_w)
        for k in range(count):
            reference.assert_close("w", w[k], reference.forward(v[k], g[k], dim[k]))
            want_v, want_g = reference.backward(v[k], g[k], grad_w[k], dim[k])
            reference.assert_close("grad_v", v[k].grad, want_v)
            reference.assert_close("grad_g", g[k].grad, want_g)
            assert norm[k].shape == g[k].shape
            assert not norm[k].requires_grad


def test_lists_of_other_layouts(compiled_backend, ops):
    """Every tensor of the list has to be copied first, and the copies have to live."""
    v = [randn((6, 5, 8), layout="cut") for _ in range(9)]
    wide = [torch.randn(6, 2, 1) for _ in range(9)]
    g = [t[:, :1] for t in wide]
    grad_w = [randn((6, 5, 8), layout="transposed") for _ in range(9)]
    w, norm = halves(ops.forward(v, g, [0] * 9, [0.0] * 9))
    spaced = [torch.stack([n, n], 1).select(1, 0) for n in norm]
    yes = [True] * 9
    grad_v, grad_g = halves(ops.backward(grad_w, v, g, spaced, [0] * 9, [0.0] * 9, yes, yes))
    for k in range(9):
        reference.assert_close("w", w[k], reference.forward(v[k], g[k], 0))
        want_v, want_g = reference.backward(v[k], g[k], grad_w[k], 0)
        reference.assert_close("grad_v", grad_v[k], want_v)
        reference.assert_close("grad_g", grad_g[k], want_g)


def test_second_order_of_a_list(compiled_backend, ops):
    """One backward node for several weights, some of whose gradients nobody wants."""
    v = [randn((3, 4), torch.float64).requires_grad_(k != 1) for k in range(3)]
    g = [randn((3, 1), torch.float64).requires_grad_(k != 2) for k in range(3)]
    leaves = [t for t in (*v, *g) if t.requires_grad]

    def weights(*_):
        return tuple(ops.forward(v, g, [0] * 3, [0.0] * 3)[0])

    assert torch.autograd.gradcheck(weights, leaves)
    assert torch.autograd.gradgradcheck(weights, leaves)


def test_unused_members_get_no_gradient(compiled_backend, ops):
    """One node for the list: outputs that nothing was computed from leave ``.grad`` at None."""
    v = [torch.randn(3, 4, requires_grad=True) for _ in range(3)]
    g = [torch.randn(3, 1, requires_grad=True) for _ in range(3)]
    w, _ = halves(ops.forward(v, g, [0] * 3, [0.0] * 3))
    w[1].sum().backward()
    assert [t.grad is None for t in v] == [True, False, True]
    assert [t.grad is None for t in g] == [True, False, True]
    w[0].sum().backward()  # the node runs again
    assert [t.grad is None for t in v] == [False, False, True]


def test_empty_members(compiled_backend, ops):
    """Members of no elements among others; the norm of nothing is 0."""
    v = [torch.randn(3, 0), torch.randn(3, 4), torch.randn(0, 4)]
    g = [torch.randn(3, 1), torch.randn(3, 1), torch.randn(0, 1)]
    w, norm = halves(ops.forward(v, g, [0] * 3, [0.0] * 3))
    reference.assert_close("w", w[1], reference.forward(v[1], g[1], 0))
    assert torch.equal(norm[0], torch.zeros(3, 1))
    yes = [True] * 3
    _, grad_g = halves(ops.backward(w, v, g, norm, [0] * 3, [0.0] * 3, yes, yes))
    assert torch.equal(grad_g[0], torch.zeros(3, 1))


@pytest.mark.parametrize("size", [1e30, 1e-30, 0.0])
def test_norm_is_not_clamped(compiled_backend, ops, size):
    v = randn((4, 5))
    v[2] *= size
    _, norm = ops.forward([v], [torch.ones(4, 1)], [0], [0.5])
    want = reference.norm(v, 0)
    reference.assert_close("norm", norm, reference.Expected(want, want, 5, torch.float32))


def same_metadata(a, b):
    assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@pytest.mark.parametrize("out_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("layout", "dim"), layout_dims([k for k in LAYOUTS if k != "expanded"]))
def test_fake_tensors(route, layout, dim, out_dtype):
    shape = LAYOUTS[layout]
    v, g = randn(shape, layout=layout), randn_g(shape, dim)
    real = F.weight_norm(v, g, dim, out_dtype=out_dtype)
    with FakeTensorMode():
        fake = F.weight_norm(
            empty(shape, torch.float32, layout), torch.empty(g.shape), dim, out_dtype=out_dtype
        )
    same_metadata(fake, real)


def test_fake_tensors_backward(route):
    with FakeTensorMode():
        v = torch.empty(4, 5, requires_grad=True)
        g = torch.empty(4, 1, requires_grad=True)
        F.weight_norm(v, g).sum().backward()
        assert (v.grad.shape, g.grad.shape) == (v.shape, g.shape)


@pytest.mark.parametrize("dim", [0, 1, 2, None])
def test_meta_operators(compiled_backend, ops, dim):
    v, g, d = (t.to("meta") if isinstance(t, torch.Tensor) else t for t in arguments(dim))
    same_metadata(ops.weight_norm(v, g, d), v)
    w, norm = ops.forward([v], [g], [d], [0.0])
    same_metadata(w, v)
    same_metadata(norm, g)
    grad_v, grad_g = ops.backward([w], [v], [g], [norm], [d], [0.0], [True], [True])
    same_metadata(grad_v, v)
    same_metadata(grad_g, g)


@pytest.mark.parametrize("dim", [0, 1, 2, None])
@pytest.mark.parametrize("choice", ["auto", "eager"])
def test_meta_device(choice, dim):
    with wnkernel.use_backend(choice):
        v = torch.empty(3, 4, 5, device="meta", requires_grad=True)
        g = torch.empty(g_shape((3, 4, 5), dim), device="meta", requires_grad=True)
        w = F.weight_norm(v, g, dim)
        same_metadata(w, v)
        w.sum().backward()
        same_metadata(v.grad, v)
        same_metadata(g.grad, g)


LENGTHS = ["v", "g", "norm", "grad_w", "dim", "eps", "need_v", "need_g"]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("short", LENGTHS[1:])
def test_lists_of_different_lengths(ops, short, grad):
    lists = {
        "grad_w": [torch.ones(3, 4)],
        "v": [torch.ones(3, 4, requires_grad=grad)],
        "g": [torch.ones(3, 1)],
        "norm": [torch.ones(3, 1)],
        "dim": [0],
        "eps": [0.0],
        "need_v": [1],
        "need_g": [1],
    }
    with pytest.raises(ValueError, match=f"{short}: expected 1 entries .* got 0"):
        ops.backward(**(lists | {short: []}))
    if short in ("g", "dim", "eps"):
        forward = {k: lists[k] for k in ("v", "g", "dim", "eps")}
        with pytest.raises(ValueError, match=f"{short}: expected 1 entries .* got 0"):
            ops.forward(**(forward | {short: []}))


def test_norm_changed_in_place(ops):
    v, g = torch.randn(3, 4, requires_grad=True), torch.rand(3, 1)
    w, norm = ops.forward([v], [g], [0], [0.0])
    norm.mul_(2)
    with pytest.raises(RuntimeError, match="inplace operation: norm"):
        w.sum().backward()


@pytest.mark.parametrize("grad", [False, True])
def test_any_nonzero_need_counts(ops, grad):
    v = [torch.randn(3, 4, requires_grad=grad) for _ in range(2)]
    g = [torch.rand(3, 1) for _ in range(2)]
    _, norm = halves(ops.forward(v, g, [0, 0], [0.0, 0.0]))
    grads = ops.backward([torch.ones(3, 4)] * 2, v, g, norm, [0, 0], [0.0, 0.0], [2, 1], [0, 1])
    assert [x.shape for x in grads] == [(3, 4), (3, 4), (3, 1)]


def test_forward_under_transforms(ops):
    v, g, tangent = torch.randn(3, 4), torch.rand(3, 1), torch.randn(3, 4)

    def w(v):
        return ops.forward([v], [g], [0], [0.0])[0]

    def formula(v):
        return g * v / v.norm(dim=1, keepdim=True)

    for got, expected in zip(
        torch.func.jvp(w, (v,), (tangent,)), torch.func.jvp(formula, (v,), (tangent,)), strict=True
    ):
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.func.vmap(w)(v[None]), formula(v)[None])


@pytest.mark.parametrize("transform", ["vmap", "jvp", "grad"])
def test_checks_hold_under_transforms(ops, transform):
    def run(v):
        w = F.weight_norm(v, torch.ones(1, 4), 0)
        return w.sum() if transform == "grad" else w

    v = torch.randn(4, 4)
    call = {
        "vmap": lambda: torch.func.vmap(run)(v[None]),
        "jvp": lambda: torch.func.jvp(run, (v,), (v,)),
        "grad": lambda: torch.func.grad(run)(v),
    }[transform]
    with pytest.raises(ValueError, match="g: expected shape"):
        call()
