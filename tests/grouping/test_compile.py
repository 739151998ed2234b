"""torch.compile over models in a group."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import wnkernel

from ..compiled import (
    Net,
    assert_same,
    by_inductor,
    change,
    model,
    open_scopes,
    randn,
    step,
    twins,
)
from ..versions import attributes_are_guarded, layers_in_graphs, needs

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def whole(m: Net, **how: object) -> Callable:
    return torch.compile(m, **how)


def in_place(m: Net, **how: object) -> Callable:
    m.compile(**how)
    return m


def forward(m: Net, **how: object) -> Callable:
    m.forward = torch.compile(m.forward, **how)
    return m


def function(m: Net, **how: object) -> Callable:
    return torch.compile(lambda x: m(x), **how)


def part(m: Net, **how: object) -> Callable:
    m[2] = torch.compile(m[2], **how)
    return m


def part_in_place(m: Net, **how: object) -> Callable:
    m[2].compile(**how)
    return m


WHOLE, PARTS = [whole, in_place, forward, function], [part, part_in_place]
ORDERS = ["fuse, compile", "compile, fuse", "compile, call, fuse"]


def str_or_name(parameter: object) -> str:
    return getattr(parameter, "__name__", parameter)


def train(
    compiled: Callable, order: str = ORDERS[0], reuse: str = ""
) -> tuple[list[list[Tensor]], int, int]:
    """Ten training steps in a group, and one without; how often Dynamo compiled until either."""
    torch.manual_seed(1)
    torch.compiler.reset()
    m = model()
    counter = CompileCounterWithBackend("eager")
    how = {"backend": counter, "fullgraph": True}
    if order == ORDERS[0]:
        group = wnkernel.fuse(m, reuse=reuse) if reuse else None
        run = compiled(m, **how)
    else:
        run = compiled(m, **how)
        if order == ORDERS[2]:
            run(torch.ones(2, 2, 8)).sum().backward()
        # An OptimizedModule may be fused as well as what it wraps.
        group = wnkernel.fuse(run if isinstance(run, nn.Module) else m, reuse=reuse)
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
    results, frames = [], 0
    for k in range(11):
        if k == 10:
            frames = counter.frame_count
            if group is not None:
                assert open_scopes(group) == 0
                group.remove()
        results.append(step(run, m, randn()))
        optimizer.step()
        change(m)
    return results, frames, counter.frame_count


@functools.cache
def trained_unfused(compiled: Callable) -> list[list[Tensor]]:
    return train(compiled)[0]


def check_training(compiled: Callable, reference: Callable, order: str, reuse: str) -> None:
    want = trained_unfused(reference)
    got, frames, frames_after_remove = train(compiled, order, reuse)
    for ours, theirs in zip(got, want, strict=True):
        assert_same(ours, theirs)
    before = order == ORDERS[2]  # a graph without a group, which then no longer holds
    assert frames == 1 + before
    assert frames_after_remove <= 2 + before  # without the group it is another program


@layers_in_graphs
@pytest.mark.parametrize(
    ("compiled", "order", "reuse"),
    [
        *((compiled, order, "version") for compiled in WHOLE for order in ORDERS[:2]),
        (whole, ORDERS[0], "forward"),
        pytest.param(whole, ORDERS[2], "forward", marks=attributes_are_guarded),
    ],
    ids=str_or_name,
)
def test_ten_calls_compile_once(compiled, order, reuse, launched):
    check_training(compiled, whole, order, reuse)
    assert launched == []  # what a graph computes is none of the eager launches


@layers_in_graphs
@pytest.mark.parametrize(
    ("compiled", "order", "reuse"),
    [
        (part, ORDERS[0], "forward"),
        (part, ORDERS[1], "version"),
        (part_in_place, ORDERS[0], "version"),
        (part_in_place, ORDERS[1], "forward"),
    ],
    ids=str_or_name,
)
def test_compiled_part_of_an_eager_model_compiles_once(compiled, order, reuse, launched):
    check_training(compiled, part, order, reuse)
    # One for what runs eagerly, as soon as the group has seen that nobody reads the others.
    assert launched == [5] + 9 * [2]


@pytest.mark.parametrize(
    "where",
    [
        pytest.param("around", marks=layers_in_graphs),
        pytest.param("within", marks=needs("scopes in graphs")),
    ],
)
def test_explicit_scope_does_not_recompile(where, launched):
    m, twin, group = twins()
    counter = CompileCounterWithBackend("eager")
    inner = torch.compile(m, backend=counter, fullgraph=True) if where == "around" else m

    def run(x: Tensor) -> Tensor:
        with group.scope():
            return inner(x)

    if where == "within":
        run = torch.compile(run, backend=counter, fullgraph=True)
    for _ in range(10):
        x = randn()
        assert_same(step(run, m, x), step(torch.compile(twin, backend="eager"), twin, x))
        change(m, twin)
    assert counter.frame_count == 1
    assert open_scopes(group) == 0
    assert launched == []


def test_every_backend_compiles_the_same_of_a_fused_model(backend):
    m, twin, _ = twins()
    x = randn()
    results = []
    for module in (twin, m):
        torch.compiler.reset()  # or the second would run the code of the first
        run = torch.compile(module, backend="aot_eager", fullgraph=True)
        results.append(step(run, module, x))
    assert_same(*results)


def test_inductor_makes_the_same_of_a_fused_model():
    m, twin, _ = twins()
    x = randn()
    results = []
    for module in (twin, m):
        torch.compiler.reset()
        results.append(step(by_inductor(module), module, x))
    assert_same(*results)


def test_compiled_and_eager_calls_take_turns(launched):
    """Neither sees the other: what a group does meanwhile does not recompile."""
    m, _, group = twins("version")
    counter = CompileCounterWithBackend("eager")
    run = torch.compile(m, backend=counter, fullgraph=True)
    x = randn()
    eager, compiled = m(x), run(x)
    for _ in range(3):
        assert torch.equal(m(x), eager)
        assert torch.equal(run(x), compiled)
        group.refresh()
        with group.scope():
            assert torch.equal(m(x), eager)
            assert torch.equal(run(x), compiled)
    assert counter.frame_count == 1
    assert launched == 4 * [5]


def test_weight_that_a_graph_reads_is_computed_there():
    m, twin, group = twins("version")
    counter = CompileCounterWithBackend("eager")
    run = torch.compile(lambda: m[0][0].weight * 2, backend=counter, fullgraph=True)
    run_twin = torch.compile(lambda: twin[0][0].weight * 2, backend="eager")
    with group.scope():
        for _ in range(3):
            m(randn())
            assert torch.equal(run(), run_twin())
            change(m, twin)
    assert counter.frame_count == 1


@pytest.mark.parametrize(("reuse", "where"), [("forward", ["", "2"]), ("version", ["0"])], ids=str)
def test_graph_breaks_leave_no_scope_open(where, reuse):
    m, twin, group = twins(reuse)
    x = randn()
    results, frames = [], []
    for module in (twin, m):
        torch.compiler.reset()
        for name in where:
            module.get_submodule(name).breaks = True
        counter = CompileCounterWithBackend("eager")
        run = torch.compile(module, backend=counter)
        for _ in range(2):
            results.append(step(run, module, x))
            frames.append(counter.frame_count)
            change(module)
            assert open_scopes(group) == 0
    assert_same(results[0] + results[1], results[2] + results[3])
    assert frames[:2] == frames[2:]
    assert frames[0] > 1


def test_copy_of_a_compiled_model_has_a_group_of_its_own(launched):
    m, _, _ = twins()
    x = randn()
    torch.compile(m, backend="eager", fullgraph=True)(x)
    want = m(x)
    copied = copy.deepcopy(m)
    change(m)
    assert torch.equal(copied(x), want)
    assert launched == [5, 5]
