"""Compiled autograd (torch.compile of a backward) over weight norms whose forward was eager."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from wnkernel import functional as F
from wnkernel._versions import LIMITS, release

from ..cases import randn, randn_g
from ..compiled import Net, assert_same, change, twins
from ..compiled import randn as input_of_model
from ..versions import since

pytestmark = pytest.mark.usefixtures("fresh_compiler")

COMPILERS = ("eager", "aot_eager")


@pytest.fixture
def route(route: str) -> str:
    if route == "eager" and release(torch.__version__) < LIMITS["nodes of Python"].since:
        pytest.skip(LIMITS["nodes of Python"].what)
    return route


@contextmanager
def compiled_backward(compiler: str = "aot_eager") -> Iterator[CompileCounterWithBackend]:
    """Backwards within the block are graphs; counts how many."""
    counter = CompileCounterWithBackend(compiler)
    compile_graph = torch.compile(backend=counter, fullgraph=True)
    enable = getattr(compiled_autograd, "_enable", None) or compiled_autograd.enable
    with enable(compile_graph):
        yield counter


def gradients(m: Net, run: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor | None]:
    m.zero_grad()
    run(x).square().sum().backward()
    return [p.grad for p in m.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("forward", "compiler"), [*(("eager", name) for name in COMPILERS), ("compiled", "aot_eager")]
)
@pytest.mark.parametrize("fused", [False, True])
def test_training(route, fused, forward, compiler):
    """Parameters change between the steps, and the graph is compiled once."""
    m, twin, group = twins()
    if not fused:
        group.remove()
    for each in (m, twin):
        each[0][0].parametrizations.weight.original0.requires_grad_(False)
    run = torch.compile(m, backend=compiler) if forward == "compiled" else m
    x = input_of_model()

    def steps(module: Net, call: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor | None]]:
        for _ in range(3):
            yield gradients(module, call, x)
            change(module)

    with compiled_backward(compiler) as counter:
        got = list(steps(m, run))
    torch.testing.assert_close(got, list(steps(twin, twin)))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("dim", "dtype"), [(0, torch.float32), (1, torch.float64), (None, torch.bfloat16)], ids=str
)
def test_one_weight(route, dim, dtype):
    shape = (4, 5, 6)
    v, g, grad_w = randn(shape, dtype), randn_g(shape, dim, dtype), randn(shape, dtype)
    results = []
    for compiled in (True, False):
        a, b = (t.clone().requires_grad_() for t in (v, g))
        w = F.weight_norm(a, b, dim, eps=0.5)
        if compiled:
            with compiled_backward():
                w.backward(grad_w)
        else:
            w.backward(grad_w)
        results.append([a.grad, b.grad])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("changed", ["v", "g"])
def test_a_change_before_the_backward_is_an_error(route, changed):
    tensors = {"v": randn((4, 5)).requires_grad_(), "g": randn_g((4, 5), 0).requires_grad_()}
    w = F.weight_norm(**tensors)
    with torch.no_grad():
        tensors[changed].add_(1)
    with compiled_backward(), pytest.raises(RuntimeError, match=f"inplace operation: {changed} of"):
        w.sum().backward()


@since(
    "2.7", "before torch 2.7 compiled autograd traces our node, and calls nothing that could fail"
)
def test_a_compiler_that_fails_leaves_a_node_as_it_was(monkeypatch):
    v, g = randn((4, 5)).requires_grad_(), randn_g((4, 5), 0).requires_grad_()
    grad_w = randn((4, 5))
    w = F.weight_norm(v, g)
    want = torch.autograd.grad(w, (v, g), grad_w, retain_graph=True)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of ideas")

    with monkeypatch.context() as patch:
        patch.setattr(compiled_autograd.AutogradCompilerInstance, "apply_functional", fail)
        with compiled_backward(), pytest.raises(RuntimeError, match="out of ideas"):
            w.backward(grad_w, retain_graph=True)
    got = torch.autograd.grad(w, (v, g), grad_w)
    assert_same(list(got), list(want))


def test_a_list_of_which_not_all_is_read(route):
    if route == "eager" and release(torch.__version__) < (2, 7):
        pytest.skip("torch 2.6 cannot compile backwards of Python that return a None among others")
    leaves = [randn((4, 5)) for _ in range(3)], [randn_g((4, 5), 0) for _ in range(3)]
    results = []
    for compiled in (True, False):
        v, g = ([t.clone().requires_grad_() for t in column] for column in leaves)
        v[0].requires_grad_(False)
        w = F.weight_norms(v, g, [0] * 3)
        loss = w[0].sum() + w[2][:2].square().sum() - w[2].sum()
        if compiled:
            with compiled_backward():
                loss.backward()
        else:
            loss.backward()
        results.append([t.grad for t in (*v, *g)])
    for got, want in zip(*results, strict=True):
        assert (got is None) == (want is None)
        assert got is None or torch.allclose(got, want, atol=1e-6)
