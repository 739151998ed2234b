"""The Triton backend around its kernels: what it reads in place, uploads, compilers, and second
derivatives."""

from __future__ import annotations

import gc
import itertools
import threading
from collections import Counter

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import wnkernel
from wnkernel import functional as F
from wnkernel.backends import gpu_operators
from wnkernel.backends.triton import arrays
from wnkernel.problem import check

from . import reference
from .cases import LAYOUTS, randn, randn_g
from .messages import message
from .triton_cases import (
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


@pytest.fixture
def uploads(monkeypatch):
    """Uploads without a GPU: any memory counts as pinned, and copies go to the meta device."""
    pytest.importorskip("triton")
    from wnkernel.backends.triton import device

    empty, numbered = torch.empty, itertools.count()

    def pinned(*args, pin_memory=False, **kwargs):
        return empty(*args, **kwargs).fill_(-1) if pin_memory else empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", pinned)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)

    class Watched(device.Uploads):
        """Remembers where captured copies came from, without keeping it."""

        def __init__(self):
            super().__init__()
            self.taken = []

        def _take(self, numbers):
            t = super()._take(numbers)
            self.taken.append((t.data_ptr(), numbers, StorageWeakRef(t.untyped_storage())))
            return t

        def upload(self, numbers, capturing=True):
            monkeypatch.setattr(device, "is_capturing", lambda _: capturing)
            memory = torch.full((numbers,), next(numbered), dtype=torch.int64, device="cpu")
            assert self.copy(memory, torch.device("meta")).shape == (numbers,)

        def check(self):
            """No two copies came from the same memory, and all that was copied is there still."""
            gc.collect()
            end = 0
            for start, numbers, storage in sorted(self.taken, key=lambda copy: copy[0]):
                assert start >= end
                end = start + 8 * numbers
                assert not storage.expired()
            contents = torch.cat(self._reserve).tolist()
            found = Counter(x for x in contents if x >= 0)
            assert sorted(found.values()) == sorted(numbers for _, numbers, _ in self.taken)

    return Watched()


@needs_triton
def test_captured_copies_come_from_memory_of_their_own(uploads):
    """A graph reads it at every replay, and nobody says when the graph is gone."""
    for numbers in (100, 1, 5000, 100, 60_000, 70_000, 200_000, 3):
        uploads.upload(numbers)
        uploads.upload(10, capturing=False)
    uploads.check()
    assert len(uploads.taken) == 8


@needs_triton
def test_the_reserve_is_made_before_a_capture(uploads):
    """Within one, older torch cannot allocate pinned memory."""
    uploads.upload(10, capturing=False)
    made = len(uploads._reserve)
    for _ in range(20):
        uploads.upload(3000)
    assert len(uploads._reserve) == made == 1
    uploads.upload(10, capturing=False)
    uploads.upload(100_000)
    assert len(uploads._reserve) == 2
    uploads.check()


@needs_triton
def test_copies_captured_in_two_threads(uploads):
    """The second comes when the first has seen that there is enough for itself."""
    uploads.upload(10, capturing=False)
    lock, entered = uploads._lock, []

    class Late:
        """Lets the other thread go first, once."""

        def __enter__(self):
            if not entered:
                entered.append(True)
                other = threading.Thread(target=uploads.upload, args=(uploads._left - 5,))
                other.start()
                other.join()
            return lock.__enter__()

        def __exit__(self, *error):
            return lock.__exit__(*error)

    uploads._lock = Late()
    uploads.upload(100)
    uploads.check()


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
    """Operators are what wnkernel._C has; tests/test_triton_operators.py."""
    monkeypatch.setattr(gpu_operators, "devices", [])
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
