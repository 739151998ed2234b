"""Graphs of torch.compile as they come to a compiler, with the pass over weight norms, and run as
they are: what Inductor would do after that is not ours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import fx
from torch._dynamo.backends.common import aot_autograd

from wnkernel.compiled_graphs import merge_weight_norms

Operators = Counter[str]
"""How often each operator of torch.ops.wnkernel stands in a graph."""


def operators(graph: fx.Graph) -> Operators:
    names = (str(node.target) for node in graph.nodes if node.op == "call_function")
    return Counter(n.split(".")[1] for n in names if n.startswith("wnkernel."))


class Graphs:
    """The backend of a ``torch.compile``.

    Args:
        merge: whether the pass is run.
    """

    def __init__(self, *, merge: bool = True) -> None:
        self.merge = merge
        self.found: list[Operators] = []
        """Of every graph, in the order in which they were compiled."""

    def __call__(self, graph: fx.GraphModule, inputs: list) -> Callable:
        compiler = self._compile
        partition = min_cut_rematerialization_partition  # as Inductor
        return aot_autograd(fw_compiler=compiler, partition_fn=partition)(graph, inputs)

    def _compile(self, module: fx.GraphModule, inputs: list) -> Callable:
        if self.merge:
            merge_weight_norms(module.graph)
            module.graph.lint()
            module.recompile()
        self.found.append(operators(module.graph))
        return make_boxed_func(module.forward)


def compiled(f: Callable, **how: object) -> tuple[Callable, Graphs]:
    """A function through torch.compile, and the graphs that come of it."""
    graphs = Graphs()
    return torch.compile(f, backend=graphs, fullgraph=True, **how), graphs
