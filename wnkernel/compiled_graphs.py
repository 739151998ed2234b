"""One launch for the weight norms of a graph that ``torch.compile`` makes.

Dynamo and AOTAutograd put one operator for each weight into their graphs. Inductor gets one graph
for the forward and one for the backward, and there a pass replaces operators on single weights by
operators on lists. The pass moves no operator past a write, and a weight that is read again after a
write is another node, so no weight can be out of date.

Weights of a fused model carry the number of their bucket, and all weights of a bucket are computed
together. Other weights share launches of up to :data:`SHARED_BYTES`, in the order in which they are
read. The results have the same bits as those of single weights.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from ._version import __version__

SHARED_BYTES = 64 << 20
"""How many bytes of v may be in one launch of weights that are in no group.

Sharing saves up to 0.1 ms per weight but needs memory: every w of a launch is computed with the
first, and every grad_w is kept until the last is there. docs/compile.md compares other limits.
"""

SLOT = "post_grad_custom_pre_pass"
"""The setting of Inductor that holds a user's own pass over forward and backward graphs."""

INFERENCE_AWARE = "CustomInferenceAwareGraphPass"
"""Inductor's type of a pass that is told whether a graph is for inference."""


def install() -> None:
    """Make Inductor run :func:`merge_weight_norms` after the pass that others may have set.

    Every tracing of an operator calls this, because others may change the setting at any time.
    """
    config = sys.modules.get("torch._inductor.config")
    if config is None:
        return
    before = getattr(config, SLOT)
    if not isinstance(before, GraphPass):
        setattr(config, SLOT, _graph_pass(before))


class GraphPass:
    """The pass that Inductor calls for every graph.

    Args:
        before: the earlier value of the setting: one pass, several passes or None.
    """

    def __init__(self, before: Any) -> None:
        several = isinstance(before, (list, tuple))
        self.before = tuple(before) if several else () if before is None else (before,)

    def __call__(self, graph: fx.Graph, is_inference: bool = False) -> None:
        aware = getattr(_pass_types(), INFERENCE_AWARE, ())
        for other in self.before:
            if isinstance(other, aware):
                other(graph, is_inference=is_inference)
            else:
                other(graph)
        merge_weight_norms(graph)

    def uuid(self) -> Any:
        """The key of this pass in Inductor's cache of graphs; None if graphs cannot be cached."""
        others = [other.uuid() if hasattr(other, "uuid") else None for other in self.before]
        types = _pass_types()
        if types is None or None in others:
            return None
        content = types.get_hash_for_files((__file__,))
        return "wnkernel", __version__, content, SHARED_BYTES, *others

    def __reduce__(self) -> tuple[Any, ...]:
        return _graph_pass, (self.before,)


def _graph_pass(before: Any) -> GraphPass:
    """Make the pass. Since torch 2.6 graphs are cached only if their pass is a CustomGraphPass. The
    type of a pass tells Inductor whether to say if a graph is for inference."""
    types = _pass_types()
    if types is None:
        return GraphPass(before)
    base = getattr(types, INFERENCE_AWARE, types.CustomGraphPass)
    return type(GraphPass.__name__, (GraphPass, base), {"__module__": __name__})(before)


def _pass_types() -> Any:
    return sys.modules.get("torch._inductor.custom_graph_pass")


def merge_weight_norms(graph: fx.Graph) -> None:
    """Replace operators on single weights by operators on lists, wherever two or more of them can
    be computed at the same place of a graph."""
    ops = torch.ops.wnkernel
    while launch := _next_launch(graph, (ops.weight_norm.default, ops.forward_one.default)):
        _replace_forward(graph, launch)
    while launch := _next_launch(graph, (ops.backward_one.default,)):
        _replace_backward(graph, launch)


class Launch:
    """Operators that can be computed at one place of a graph."""

    def __init__(self, writes: Sequence[int] = ()) -> None:
        self.nodes: list[fx.Node] = []
        self.ready = -1
        """The place of the last input of these operators."""
        self.nbytes = 0
        self.later: dict[fx.Node, int] = {}
        """These operators and all nodes that depend on them, with their places."""
        self.bounds = list(writes)
        """Places that no node of ``later`` is moved past: every write, since views may share the
        memory that it changes, and every dependent node that must stay at its place."""

    def add(self, node: fx.Node, place: dict[fx.Node, int], nbytes: int) -> bool:
        """Add an operator if it can be computed together with the others; returns whether it was
        added."""
        if any(x in self.later for x in node.all_input_nodes):
            return False
        ready = max(self.ready, *(place[x] for x in node.all_input_nodes))
        places = [place[x] for x in (*self.nodes, node)]
        if any(min(ready, *places) < bound < max(ready, *places) for bound in self.bounds):
            return False
        self.nodes.append(node)
        self.ready = ready
        self.nbytes += nbytes
        self.later[node] = place[node]
        return True

    def pass_by(self, node: fx.Node, place: dict[fx.Node, int]) -> None:
        """Record a node that comes later in the graph, if it depends on one of these operators."""
        if any(x in self.later for x in node.all_input_nodes):
            self.later[node] = place[node]
            if not _can_be_moved(node):
                self.bounds.append(place[node])


def _next_launch(graph: fx.Graph, singles: Sequence[Callable[..., Any]]) -> Launch | None:
    """Find two or more of the operators in ``singles`` that can be computed at the same place."""
    place = {node: k for k, node in enumerate(graph.nodes)}
    writes = [place[node] for node in graph.nodes if _writes(node)]
    launches: dict[Any, Launch] = {}
    for node in graph.nodes:
        if node.target in singles and _can_be_replaced(node):
            named = _arguments(node)
            v = _fake(named["v"])
            key = named["bucket"], v.device, named.get("out_dtype")
            launch = launches.setdefault(key, Launch(writes))
            fits = named["bucket"] is not None or launch.nbytes + _bytes(v) <= SHARED_BYTES
            if not (launch.nodes and fits and launch.add(node, place, _bytes(v))):
                if len(launch.nodes) > 1:
                    return launch
                launches[key] = Launch(writes)
                launches[key].add(node, place, _bytes(v))
        for launch in launches.values():
            launch.pass_by(node, place)
    return next((launch for launch in launches.values() if len(launch.nodes) > 1), None)


def _writes(node: fx.Node) -> bool:
    """Whether a node does more than give results: it writes to a tensor, or it returns nothing, as
    an operator that frees a tensor or waits for a stream. In graphs that Inductor gets, few nodes
    do, apart from the writes to parameters at the end."""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return "mutation" in node.target.name()
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    schema = node.target._schema
    return schema.is_mutable or not schema.returns


def _can_be_moved(node: fx.Node) -> bool:
    """Whether a node gives the same result at a later place and has no other effect."""
    target = node.target
    if target is operator.getitem:
        return True
    return (
        isinstance(target, torch._ops.OpOverload)
        and not _writes(node)
        and torch.Tag.nondeterministic_seeded not in target.tags
    )


def _can_be_replaced(node: fx.Node) -> bool:
    """Whether every input and result of a node has a known fake tensor, and no user reads a
    gradient that is not needed: the operator on lists returns nothing for such a gradient."""
    is_single = node.target is torch.ops.wnkernel.weight_norm.default  # the others return pairs
    results = (node,) if is_single else (node, *node.users)
    if any("val" not in x.meta for x in (*node.all_input_nodes, *results)):
        return False
    if is_single:
        return True
    named = _arguments(node)
    wanted = named.get("need_v", True), named.get("need_g", True)
    return all(
        user.target is operator.getitem and (wanted[_index(user)] or not user.users)
        for user in node.users
    )


def _index(item: fx.Node) -> Any:
    """The index of the result that an ``operator.getitem`` takes."""
    return item.args[1]


def _bytes(v: torch.Tensor) -> int:
    """The size of v in bytes. A symbolic size counts as a large one, because reading its value
    would make the graph depend on it."""
    numel = v.numel()
    return numel * v.element_size() if isinstance(numel, int) else SHARED_BYTES


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator by name, including those that have their default value."""
    return _named(node.target, node.args, node.kwargs)


def _fake_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator by name, as fake tensors. Inductor may choose other strides than
    these tensors have. Where it records the strides of eager mode, those are used."""
    fakes = _named(node.target, *fx.map_arg((node.args, node.kwargs), _fake))
    noted = _named(node.target, *node.meta.get("eager_input_vals", ((), {})))
    return fakes | {name: x for name, x in noted.items() if isinstance(x, torch.Tensor)}


def _named(target: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    arguments = target._schema.arguments
    given = dict(zip((a.name for a in arguments), args, strict=False))
    return {a.name: a.default_value for a in arguments} | given | kwargs


def _fake(node: fx.Node) -> Any:
    return node.meta["val"]


def _replace_forward(graph: fx.Graph, launch: Launch) -> None:
    def arguments(rows: list[dict[str, Any]]) -> tuple[Any, ...]:
        return *_columns(rows, "v", "g", "dim", "eps"), rows[0]["out_dtype"]

    results = _call(graph, launch, torch.ops.wnkernel.forward.default, arguments)
    for k, node in enumerate(launch.nodes):
        if node.target is torch.ops.wnkernel.weight_norm.default:
            _take(graph, results, k, node)
        else:
            _take_pair(graph, results, (k, len(launch.nodes) + k), node)


def _replace_backward(graph: fx.Graph, launch: Launch) -> None:
    need_v, need_g = _needs(_arguments(node) for node in launch.nodes)

    def arguments(rows: list[dict[str, Any]]) -> tuple[Any, ...]:
        return *_columns(rows, "grad_w", "v", "g", "norm", "dim", "eps"), need_v, need_g

    results = _call(graph, launch, torch.ops.wnkernel.backward.default, arguments)
    for k, node in enumerate(launch.nodes):
        _take_pair(graph, results, (sum(need_v[:k]), sum(need_v) + sum(need_g[:k])), node)


def _needs(rows: Iterable[dict[str, Any]]) -> list[list[int]]:
    return [[int(x) for x in column] for column in _columns(list(rows), "need_v", "need_g")]


def _columns(rows: list[dict[str, Any]], *names: str) -> list[list[Any]]:
    return [[row[name] for row in rows] for name in names]


def _call(
    graph: fx.Graph,
    launch: Launch,
    target: Callable[..., Any],
    arguments: Callable[[list[dict[str, Any]]], tuple[Any, ...]],
) -> fx.Node:
    """Call an operator on lists right after the last of its inputs, and move the nodes that depend
    on it behind it."""
    nodes = list(graph.nodes)
    inputs = sum(node.op == "placeholder" for node in nodes)
    with graph.inserting_before(nodes[max(launch.ready + 1, inputs)]):
        new = graph.call_function(target, arguments([_arguments(x) for x in launch.nodes]))
    last = new
    for node, place in launch.later.items():
        if place <= launch.ready:
            last.append(node)
            last = node
    fakes = arguments([_fake_arguments(x) for x in launch.nodes])
    with torch.no_grad():
        new.meta["val"] = target(*fakes)
    new.meta["eager_input_vals"] = fakes, {}
    return new


def _take_pair(graph: fx.Graph, results: fx.Node, places: tuple[int, int], node: fx.Node) -> None:
    """Replace the results of an operator on one weight by those of the operator on lists."""
    for item in list(node.users):
        if item.users:
            _take(graph, results, places[_index(item)], item)
        else:
            graph.erase_node(item)
    graph.erase_node(node)


def _take(graph: fx.Graph, results: fx.Node, place: int, old: fx.Node) -> None:
    """Replace a node by one result of an operator on lists."""
    with graph.inserting_after(results):
        new = graph.call_function(operator.getitem, (results, place))
    new.meta = {"val": old.meta["val"]}
    old.replace_all_uses_with(new)
    graph.erase_node(old)
