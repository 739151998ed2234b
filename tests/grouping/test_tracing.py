"""Models in a group and what else is compiled or traced: optimizers, torch.export, torch.fx."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from ..compiled import assert_same, change, open_scopes, randn, step, twins
from ..groups import both_modes
from ..processes import PATIENCE_S
from ..versions import needs

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Own(torch.optim.Optimizer):
    """Dynamo makes one program of the whole step, with the hooks of torch's base class in it."""

    def __init__(self, params: Iterator[Tensor]) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad, alpha=-0.05)


OPTIMIZERS = {
    "own": Own,
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.05, foreach=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.05, fused=True),
}


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_compiled_optimizer_step_is_seen_and_compiles_once(name, compiler, launched):
    """fuse() counts the steps of optimizers: the count may not become a part of the compiled step,
    nor may the group miss what the step changed."""
    m, twin, _ = twins("version")
    # The twin has no optimizer, as that would be counted too.
    run = torch.compile(OPTIMIZERS[name](m.parameters()).step, backend=compiler)
    for k in range(4):
        twin.load_state_dict(m.state_dict())
        x = randn()
        for _ in range(2):
            assert_same(step(m, m, x), step(twin, twin, x))
        # Adam has no state before its first step.
        with torch._dynamo.config.patch(error_on_recompile=k > name.startswith("Adam")):
            run()
    assert launched == 4 * [5]


@both_modes
def test_another_thread_may_compile_meanwhile(reuse):
    """``torch.compiler.is_compiling()`` is then true on every thread."""
    inside, compiling, done = threading.Event(), threading.Event(), threading.Event()

    class Wait(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            inside.set()
            assert compiling.wait(PATIENCE_S)
            return x

    def slow_backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        compiling.set()
        assert done.wait(PATIENCE_S)
        return graph.forward

    def compile_something() -> None:
        assert inside.wait(PATIENCE_S)
        torch.compile(torch.sin, backend=slow_backend)(torch.ones(2))

    m, twin, group = twins(reuse)
    m[1], twin[1] = Wait(), nn.Identity()
    thread = threading.Thread(target=compile_something)
    thread.start()
    try:
        for module in (m, twin):
            step(module, module, randn())
            for p in module.parameters():
                p.grad = torch.ones_like(p)
            torch.optim.Adam(module.parameters(), lr=0.1, fused=True).step()
    finally:
        done.set()
        thread.join()
    assert reuse == "version" or group.memory()["slots"] == 0
    assert torch.equal(m[0][0].weight, twin[0][0].weight)
    with group.scope():
        assert torch.equal(m[0][0].weight, twin[0][0].weight)


@pytest.mark.parametrize(
    "strict", [False, pytest.param(True, marks=needs("strict export of hooks"))]
)
def test_export_sees_no_group(strict, launched):
    m, twin, group = twins("version")
    x = randn()
    y = m(x)
    program, of_twin = (torch.export.export(k, (x,), strict=strict) for k in (m, twin))
    assert str(program.graph) == str(of_twin.graph)
    assert set(program.state_dict) == set(twin.state_dict())
    change(m, twin)
    assert torch.equal(program.module()(x), of_twin.module()(x))
    group.refresh()
    assert torch.equal(m(x), twin(x))
    assert not torch.equal(m(x), y)
    assert open_scopes(group) == 0
    assert launched == [5, 5]


TRACERS = {
    "fx": lambda m, x: torch.fx.symbolic_trace(m),
    "make_fx": lambda m, x: make_fx(m)(x),
    "jit": lambda m, x: torch.jit.trace(m, (x,)),
}


@pytest.mark.parametrize("tracer", TRACERS)
def test_traced_weights_are_computed_in_the_trace(tracer):
    """What the group holds already may not become a constant."""
    m, twin, group = twins("version")
    x = randn()
    with torch.no_grad():  # torch.jit traces no autograd.Function, which the eager backend has
        with group.scope():
            m(x)
            traced = TRACERS[tracer](m, x)
        of_twin = TRACERS[tracer](twin, x)
        change(m, twin)
        group.refresh()
        assert torch.equal(traced(x), of_twin(x))
        assert torch.equal(m(x), twin(x))
    assert open_scopes(group) == 0
