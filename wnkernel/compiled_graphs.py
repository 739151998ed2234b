"""One launch for the weight norms of a graph that ``torch.compile`` makes.

Dynamo and AOTAutograd see one operator for each weight. In the graphs that come to Inductor, one
for the forward and one for the backward, a pass puts operators on lists in their place. No operator
is moved past a write, and a weight that is read again after one is another node, so no weight can
be out of date.

Weights of a fused model come with the number of their bucket, and all of a bucket are computed
together. Other weights share launches of up to :data:`SHARED_BYTES`, in the order in which they are
read. The bits are those of single weights.
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

Sharing saves up to a tenth of a millisecond for each weight. It costs memory: w is there earlier,
and grad_w waits for those of the others. docs/compile.md has what other sizes gave."""

SLOT = "post_grad_custom_pre_pass"
"""The setting of Inductor that holds a user's own pass over forward and backward graphs."""

INFERENCE_AWARE = "CustomInferenceAwareGraphPass"
"""Inductor's type of a pass that is told whether a graph is for inference."""


def install() -> None:
    """Let Inductor run :func:`merge_weight_norms`, after the pass that somebody else has set.

    This is called whenever an operator is traced, because settings come and go.
    """
    config = sys.modules.get("torch._inductor.config")
    if config is None:
        return
    before = getattr(config, SLOT)
    if not isinstance(before, GraphPass):
        setattr(config, SLOT, _graph_pass(before))


class GraphPass:
    """What Inductor calls.

    Args:
        before: what was set before: a pass, several, or None.
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
        """What compiled graphs are cached by; None: they cannot be."""
        others = [other.uuid() if hasattr(other, "uuid") else None for other in self.before]
        types = _pass_types()
        if types is None or None in others:
            return None
        content = types.get_hash_for_files((__file__,))
        return "wnkernel", __version__, content, SHARED_BYTES, *others

    def __reduce__(self) -> tuple[Any, ...]:
        return _graph_pass, (self.before,)


def _graph_pass(before: Any) -> GraphPass:
    """Since torch 2.6 a pass has to be a CustomGraphPass, or graphs are not cached. One that is to
    know whether a graph is for inference says so by its type."""
    types = _pass_types()
    if types is None:
        return GraphPass(before)
    base = getattr(types, INFERENCE_AWARE, types.CustomGraphPass)
    return type(GraphPass.__name__, (GraphPass, base), {"__module__": __name__})(before)


def _pass_types() -> Any:
    return sys.modules.get("torch._inductor.custom_graph_pass")


def merge_weight_norms(graph: fx.Graph) -> None:
    """Replace the operators on single weights of a graph by operators on lists, where two or more
    can be computed at the same time."""
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
        """The place of the last of their inputs."""
        self.nbytes = 0
        self.later: dict[fx.Node, int] = {}
        """Them and all that depends on them, with their places."""
        self.bounds = list(writes)
        """Places that none of these is moved past: every write, since views may share its memory,
        and every dependent node that has to stay where it is."""

    def add(self, node: fx.Node, place: dict[fx.Node, int], nbytes: int) -> bool:
        """Take one more operator, if it can be computed with those that are there."""
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
        """Look at what comes after the operators that are there."""
        if any(x in self.later for x in node.all_input_nodes):
            self.later[node] = place[node]
            if not _can_be_moved(node):
                self.bounds.append(place[node])


def _next_launch(graph: fx.Graph, singles: Sequence[Callable[..., Any]]) -> Launch | None:
    """Two or more of some operators that can be computed at the same place."""
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
    """Whether a node is there for more than its results: it writes to a tensor, or returns nothing,
    as what frees a tensor or waits for a stream. In graphs that come to Inductor few nodes are, but
    for the writes to parameters at the end."""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return "mutation" in node.target.name()
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    schema = node.target._schema
    return schema.is_mutable or not schema.returns


def _can_be_moved(node: fx.Node) -> bool:
    """Whether the result of a node is the same at a later place, and nobody waits for it there."""
    target = node.target
    if target is operator.getitem:
        return True
    return (
        isinstance(target, torch._ops.OpOverload)
        and not _writes(node)
        and torch.Tag.nondeterministic_seeded not in target.tags
    )


def _can_be_replaced(node: fx.Node) -> bool:
    """Whether it is known what goes in and comes out, and no gradient is read that is not wanted: a
    list gives nothing in its place."""
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
    """Which result of an operator an ``operator.getitem`` takes."""
    return item.args[1]


def _bytes(v: torch.Tensor) -> int:
    """A size that is not known counts as a large one: to ask would make the graph depend on it."""
    numel = v.numel()
    return numel * v.element_size() if isinstance(numel, int) else SHARED_BYTES


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator by name, those that are not given included."""
    return _named(node.target, node.args, node.kwargs)


def _fake_arguments(node: fx.Node) -> dict[str, Any]:
    """The same with fake tensors. Inductor may choose other strides than these have; where it notes
    the strides that a tensor has without a compiler, the operator is given those."""
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
    """Call an operator on lists as soon as all that it needs is there, and put what depends on it
    behind it."""
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
    """Let results of a list stand for those of an operator on one weight."""
    for item in list(node.users):
        if item.users:
            _take(graph, results, places[_index(item)], item)
        else:
            graph.erase_node(item)
    graph.erase_node(node)


def _take(graph: fx.Graph, results: fx.Node, place: int, old: fx.Node) -> None:
    """Let a result of a list stand for a tensor."""
    with graph.inserting_after(results):
        new = graph.call_function(operator.getitem, (results, place))
    new.meta = {"val": old.meta["val"]}
    old.replace_all_uses_with(new)
    graph.erase_node(old)
