"""The Triton backend around its kernels: what it reads in place, compilers, second derivatives,
allocation."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import wnkernel
from wnkernel import functional as F
from wnkernel.backends.triton import TritonBackend, arrays, availability
from wnkernel.problem import check

from .. import reference
from ..cases import LAYOUTS, randn, randn_g
from ..messages import message
from .cases import (
    DEVICE,
    TRITON,
    Case,
    assert_right,
    fresh,
    needs_triton,
    plan_of,
    record_launches,
    rows_case,
    run,
    split_early,
)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    fresh(monkeypatch)


@pytest.mark.parametrize("layout", ["transposed", "rotated", "channels_last", "unaligned"])
def test_dense_orders_are_read_in_place(layout):
    t = randn(LAYOUTS[layout], layout=layout)
    assert arrays.dense("v", t) is t
    assert arrays.ordered_like("grad_w", randn(t.shape, layout=layout), t).stride() == t.stride()
    same = torch.empty_like(t)
    assert arrays.ordered_like("grad_w", same, t) is same


class Copies(TorchDispatchMode):
    """Counts copies."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten.clone)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("v_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "expanded", "gaps"])
def test_another_order_of_grad_w_takes_one_copy(v_layout, layout):
    shape = LAYOUTS["channels_last"]
    v, grad_w = randn(shape, layout=v_layout), randn(shape, layout=layout)
    with Copies() as copies:
        t = arrays.ordered_like("grad_w", grad_w, v)
    assert t.stride() == v.stride()
    assert torch.equal(t, grad_w)
    assert copies.count == (layout != v_layout)


@needs_triton
@pytest.mark.parametrize("argument", ["v", "g", "grad_w"])
def test_lazily_negated_arguments(argument):
    """Memory of tensors with the negative bit holds what they are not."""
    c = Case(*(t.to(DEVICE) for t in (randn((4, 5)), randn_g((4, 5), 0), randn((4, 5)))))
    negated = c._replace(**{argument: torch._neg_view(getattr(c, argument))})
    assert_right(negated, run([negated])[0])


@needs_triton
def test_memory_that_was_freed_is_an_error():
    v = torch.randn(40, 512, device=DEVICE, requires_grad=True)
    g = torch.ones(40, 1, device=DEVICE)
    with wnkernel.use_backend("triton"):
        w = F.weight_norm(v, g)
        v.untyped_storage().resize_(0)  # as FSDP does
        for call in (lambda: F.weight_norm(v, g), lambda: w.sum().backward()):
            with pytest.raises(RuntimeError, match=message("v", "with memory", "freed")):
                call()


@pytest.mark.parametrize(
    ("shape", "dim", "fits"),
    [((4, 8192), 0, True), ((4, 8196), 0, False), ((4, 64), 1, False), ((768, 48, 128), 2, False)],
)
def test_what_fits_on_chip(shape, dim, fits):
    v, g = torch.empty(shape), randn_g(shape, dim)
    assert TRITON.fits_on_chip(check(v, g, dim)) is fits


def derivatives(weight_norms, cases):
    """First derivatives, and second ones in random directions: of grad_w, v and g."""
    torch.manual_seed(1)
    vs, gs, grad_ws = (
        [t.clone().requires_grad_() for t in ts]
        for ts in zip(*((c.v, c.g, c.grad_w) for c in cases), strict=True)
    )
    ws = weight_norms(vs, gs, [c.dim for c in cases], eps=[c.eps for c in cases])
    first = torch.autograd.grad(ws, (*vs, *gs), grad_ws, create_graph=True)
    directions = [torch.randn_like(t) for t in first]
    return *first, *torch.autograd.grad(first, (*grad_ws, *vs, *gs), directions)


@needs_triton
@pytest.mark.parametrize("eps", [0.0, 40.0])
def test_second_derivatives_of_split_rows(monkeypatch, eps):
    """Of a list, in which eps counts for some."""
    split_early(monkeypatch)
    views = [(1, 2, 3001), (140, 3, 5), (1, 5, 8)]
    cases = [rows_case(*view, torch.float64, eps=eps) for view in views]
    assert plan_of(cases[0])[0].split > 1
    with wnkernel.use_backend("triton"):
        got = derivatives(F.weight_norms, cases)

    def composed(v, g, dim, eps):
        return [reference.weight_norm(*each) for each in zip(v, g, dim, eps, strict=True)]

    for a, b in zip(got, derivatives(composed, cases), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@needs_triton
@pytest.mark.parametrize("count", [1, 3])
def test_without_operators_the_composed_formula_is_compiled(monkeypatch, count):
    """Operators are what wnkernel._C has; tests/triton/test_operators.py."""
    monkeypatch.setattr(TRITON, "operator_devices", [])
    launches = record_launches(monkeypatch)
    torch.compiler.reset()
    shapes = [((6, 5, 4), 0), ((6, 5, 4), 1), ((7, 9), None)][:count]
    vs = [randn(shape).to(DEVICE).requires_grad_() for shape, _ in shapes]
    gs = [randn_g(shape, dim).to(DEVICE).requires_grad_() for shape, dim in shapes]

    def step(vs, gs):
        ws = F.weight_norms(vs, gs, [dim for _, dim in shapes])
        return [w.tanh() for w in ws]

    with wnkernel.use_backend("triton"):
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
        got = compiled(vs, gs)
        assert launches == []
        want = step(vs, gs)
        assert len(launches) == 1
        torch.testing.assert_close(got, want)
        grads = [
            torch.autograd.grad(sum(y.square().sum() for y in ys), [*vs, *gs]) for ys in (got, want)
        ]
    torch.testing.assert_close(*grads)
    torch.compiler.reset()


@needs_triton
def test_a_backward_may_run_again(monkeypatch):
    """From the same node, and to the same bits."""
    launches = record_launches(monkeypatch)
    c = rows_case(1, 5, 60)
    v, g = c.v.clone().requires_grad_(), c.g.clone().requires_grad_()
    with wnkernel.use_backend("triton"):
        w = F.weight_norm(v, g, c.dim)
        first = torch.autograd.grad(w, (v, g), c.grad_w, retain_graph=True)
        second = torch.autograd.grad(w, (v, g), c.grad_w)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert [launch.kernel for launch in launches] == ["forward_one", *["backward_one"] * 2]


@needs_triton
@pytest.mark.parametrize("guards", ["torch's", "other", "none"])
def test_allocators_make_what_torch_makes(monkeypatch, guards):
    """With or without the functions that code of torch.compile calls, which are not public."""
    if guards == "other":
        monkeypatch.setattr(torch._C._dynamo, "guards", object())
    elif guards == "none":
        monkeypatch.delattr(torch._C, "_dynamo")
    allocate = arrays.allocator(DEVICE)
    for size, stride in (((3, 4), (4, 1)), ((3, 4), (1, 3)), ((), ()), ((0, 3), (3, 1))):
        for dtype in (torch.float16, torch.float64, torch.uint8):
            t = allocate(size, stride, dtype)
            assert (t.shape, t.stride(), t.dtype, t.device) == (size, stride, dtype, DEVICE)
            assert (t._version, t.requires_grad, t.is_inference()) == (0, False, False)
    with torch.inference_mode():
        assert allocate((2,), (1,), torch.float32).is_inference()


@needs_triton
def test_two_threads_at_the_first_launch_share_a_launcher():
    """cached_property has no lock since Python 3.12, and captured memory belongs to a launcher."""
    backend = TritonBackend()
    make = type(backend).__dict__["_launcher"].func
    assert make(backend) is make(backend) is backend._launcher


@needs_triton
def test_nobody_asks_again_about_a_device_that_kernels_ran_on(monkeypatch):
    asked: list[torch.device] = []
    monkeypatch.setattr(availability, "takes", lambda d: asked.append(d))
    monkeypatch.setattr(availability, "reason", lambda d: "no GPU")
    v, g = torch.ones(3, 4, device=DEVICE), torch.ones(3, 1, device=DEVICE)
    assert TRITON.reasons(v) == TRITON.reasons(v) == ["no GPU"]
    assert asked == [DEVICE] * 2
    TRITON.weights([check(v, g, 0)])
    assert TRITON.reasons(v) == []
    assert asked == [DEVICE] * 2
    assert TRITON.reasons(v.to("meta")) == ["no GPU"]
