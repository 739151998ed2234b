"""The pass over weight norms on graphs that torch.compile seldom makes: with writes to tensors,
with gradients that nobody wants, left unfinished by others."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from wnkernel.compiled_graphs import merge_weight_norms

from ..cases import randn, randn_g
from ..compiled import assert_same
from ..graphs import Operators, operators


def merged(f: Callable, *arguments: Tensor) -> tuple[fx.GraphModule, Operators]:
    """The graph of a function as it is, writes to tensors included, with the pass."""
    module = make_fx(f, tracing_mode="fake")(*arguments)
    for node in module.graph.nodes:
        if node.target is torch.ops.aten.mul_.Tensor:  # what reads after it reads the tensor itself
            node.replace_all_uses_with(node.args[0])
    merge_weight_norms(module.graph)
    module.graph.lint()
    module.recompile()
    return module, operators(module.graph)


@pytest.mark.parametrize("where", ["between", "at the end"])
def test_a_graph_that_writes_to_an_input(ops, where):
    """FSDP frees parameters within a graph, and compiled steps of optimizers end with writes."""
    leaves = [randn((4, 5)), randn_g((4, 5), 0), randn((3, 5)), randn_g((3, 5), 0)]

    def f(v: Tensor, g: Tensor, x: Tensor, h: Tensor) -> list[Tensor]:
        first = ops.forward_one(v, g, 0)[0]
        if where == "between":
            torch.ops.aten.mul_(h, 3)
        second = ops.forward_one(x, h, 0)[0]
        torch.ops.aten.mul_(h, 2)
        return [first, second]

    module, found = merged(f, *leaves)
    assert_same(module(*(t.clone() for t in leaves)), f(*(t.clone() for t in leaves)))
    assert found == ({"forward": 1} if where == "at the end" else {"forward_one": 2})


def test_a_tensor_that_is_freed(ops):
    """Its schema does not say that this operator writes."""
    v, g, t = randn((4, 5)), randn_g((4, 5), 0), randn((4, 5))
    norm = ops.forward_one(v, g, 0)[1]

    def f(w: Tensor, v: Tensor, x: Tensor, g: Tensor, norm: Tensor) -> list[Tensor]:
        first = ops.backward_one(w, v, g, norm, 0, 0.0, True, False)[0]
        torch.ops.inductor.resize_storage_bytes_(v, 0)
        return [first, ops.backward_one(torch.sin(w), x, g, norm, 0, 0.0, True, False)[0]]

    module, found = merged(f, t, v, v.clone(), g, norm)
    assert_same(list(module(t, v.clone(), v, g, norm)), f(t, v.clone(), v, g, norm))
    assert found == {"backward_one": 2}


def test_a_write_that_depends_on_a_gradient(ops):
    """What reads the tensor before it and after it reads what it read."""
    v, g, w, t = randn((4, 5)), randn_g((4, 5), 0), randn((4, 5)), randn((4, 5))
    norm = ops.forward_one(v, g, 0)[1]

    def f(t: Tensor, *rest: Tensor) -> list[Tensor]:
        first, _ = ops.backward_one(*rest, 0, 0.0, True, False)
        torch.ops.aten.mul_(t, first)
        second, _ = ops.backward_one(torch.sin(t), *rest[1:], 0, 0.0, True, False)
        return [second]

    module, _ = merged(f, t, w, v, g, norm)
    assert_same(list(module(t.clone(), w, v, g, norm)), f(t.clone(), w, v, g, norm))


def test_a_write_to_what_is_read_beside_a_gradient(ops):
    v, g, w, t = randn((4, 5)), randn_g((4, 5), 0), randn((4, 5)), randn((4, 5))
    norm = ops.forward_one(v, g, 0)[1]

    def f(t: Tensor, *rest: Tensor) -> list[Tensor]:
        first, _ = ops.backward_one(*rest, 0, 0.0, True, False)
        read = t * first
        torch.ops.aten.mul_(t, 3)
        second, _ = ops.backward_one(torch.sin(rest[0]), *rest[1:], 0, 0.0, True, False)
        return [read, second]

    module, _ = merged(f, t, w, v, g, norm)
    assert_same(list(module(t.clone(), w, v, g, norm)), f(t.clone(), w, v, g, norm))


@pytest.mark.parametrize("written", ["the tensor", "a view"])
def test_a_write_through_an_alias(ops, written):
    v, g, x, h = randn((4, 5)), randn_g((4, 5), 0), randn((3, 5)), randn_g((3, 5), 0)

    def f(v: Tensor, g: Tensor, x: Tensor, h: Tensor) -> list[Tensor]:
        view = h.view(3, 1)
        first = ops.forward_one(v, g, 0)[0]
        torch.ops.aten.mul_(h if written == "the tensor" else view, 3)
        return [first, ops.forward_one(x, view if written == "the tensor" else h, 0)[0]]

    leaves = v, g, x, h
    module, _ = merged(f, *leaves)
    assert_same(list(module(*(t.clone() for t in leaves))), f(*(t.clone() for t in leaves)))


def test_graphs_that_others_left_unfinished(ops):
    """Results that nobody uses any more, and nodes of which nothing is noted."""
    v, g, w = randn((4, 5)), randn_g((4, 5), 0), randn((4, 5))
    norm = ops.forward_one(v, g, 0)[1]

    def f(*t: Tensor) -> list[Tensor]:
        return [ops.backward_one(*t, 0, 0.0, True, False)[0] for _ in range(3)]

    module = make_fx(f, tracing_mode="fake")(w, v, g, norm)
    nodes = [n for n in module.graph.nodes if n.target is ops.backward_one.default]
    with module.graph.inserting_after(nodes[0]):
        unused = module.graph.call_function(operator.getitem, (nodes[0], 1))
    unused.meta = dict(nodes[0].meta, val=nodes[0].meta["val"][1])
    del nodes[2].meta["val"]
    merge_weight_norms(module.graph)
    module.graph.lint()
    module.recompile()
    assert_same(list(module(w, v, g, norm)), f(w, v, g, norm))
    assert operators(module.graph) == {"backward": 1, "backward_one": 1}


def test_strides_that_inductor_notes(ops):
    """It lays out its own results as it likes, and gives operators what is noted."""
    v, g = randn((4, 5)), randn_g((4, 5), 0)

    def f(v: Tensor, g: Tensor) -> list[Tensor]:
        return [ops.forward_one(v, g, 0)[0] for _ in range(2)]

    graph = make_fx(f, tracing_mode="fake")(v, g).graph
    for node in graph.nodes:
        if node.target is ops.forward_one.default:
            by_columns = node.args[0].meta["val"].t().contiguous().t()
            node.meta["eager_input_vals"] = (by_columns, None, None), {}
    merge_weight_norms(graph)
    (node,) = (n for n in graph.nodes if n.target is ops.forward.default)
    vs, gs, *_ = node.meta["eager_input_vals"][0]
    assert [t.stride() for t in vs] == 2 * [(1, 4)]
    assert [t.stride() for t in gs] == 2 * [(1, 1)]


def test_gradients_that_nobody_wants(ops):
    """What stands in their place may be returned."""
    v, g, w = randn((4, 5)), randn_g((4, 5), 0), randn((4, 5))
    norm = ops.forward_one(v, g, 0)[1]

    def f(*t: Tensor) -> list[Tensor]:
        needs = (True, False), (False, True), (True, True)
        return [x for need in needs for x in ops.backward_one(*t, 0, 0.0, *need)]

    module, _ = merged(f, w, v, g, norm)
    assert_same(list(module(w, v, g, norm)), f(w, v, g, norm))
