"""What becomes of weight norms in the graphs of torch.compile: launches of lists."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import wnkernel
from wnkernel import compiled_graphs, native
from wnkernel import functional as F

from ..cases import randn, randn_g
from ..compiled import Net, assert_same, change, model, step, twins
from ..compiled import randn as input_of_model
from ..graphs import Graphs, Operators, compiled
from ..versions import layers_in_graphs, needs, since

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.skipif(not native.loaded(), reason="without wnkernel._C there are no operators"),
]

ONE_EACH = [{"forward": 1}, {"backward": 1}]


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are in no group are computed one by one."""
    monkeypatch.setattr(compiled_graphs, "SHARED_BYTES", 0)


@layers_in_graphs
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_fused_model_has_one_operator_each_way(dynamic, apart):
    m, twin, _ = twins()
    run, graphs = compiled(m, dynamic=dynamic)
    for length in (8, 8, 8):
        x = torch.randn(2, 2, length)
        assert_same(step(run, m, x), step(twin, twin, x))
        change(m, twin)
    assert graphs.found == ONE_EACH


def test_a_model_in_no_group_has_operators_on_one_weight(apart):
    m = model()
    run, graphs = compiled(m)
    x = input_of_model()
    assert_same(step(run, m, x), step(m, m, x))
    assert graphs.found == [{"forward_one": 5}, {"backward_one": 5}]


def bfloat16_autocast() -> AbstractContextManager:
    return torch.autocast("cpu", torch.bfloat16)


@layers_in_graphs
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, bfloat16_autocast])
@pytest.mark.parametrize("autocast", [False, True])
def test_modes(mode, autocast, apart):
    m = model()
    wnkernel.fuse(m, autocast=autocast)
    x = input_of_model()
    run, graphs = compiled(m.eval())
    with torch.no_grad(), mode():
        got, want = run(x), m(x)
    assert got.dtype == want.dtype
    assert torch.equal(got, want)
    assert graphs.found == [{"forward": 1}]


@layers_in_graphs
def test_weights_in_the_dtype_of_autocast():
    """Where the group writes them in it, there is no cast in the graph."""
    casts = {}
    for autocast in (False, True):
        m = model()
        wnkernel.fuse(m, autocast=autocast)
        texts: list[str] = []

        def keep(graph: torch.fx.GraphModule, inputs: list, texts: list = texts) -> Callable:
            texts.append(graph.code)
            return graph.forward

        with torch.autocast("cpu", torch.bfloat16):
            torch.compile(m, backend=keep, fullgraph=True)(input_of_model())
        casts[autocast] = texts[0].count("torch.bfloat16")
    assert casts == {False: 0, True: 5}


@layers_in_graphs
def test_buckets_are_launches_of_their_own():
    m = nn.Sequential(*(wnkernel.weight_norm(nn.Linear(64, 64)) for _ in range(6)))
    wnkernel.fuse(m, bucket_cap_mb=2 * 64 * 64 * 4 / 2**20)
    run, graphs = compiled(m)
    x = torch.randn(3, 64)
    assert_same(step(run, m, x), step(m, m, x))
    assert graphs.found == [{"forward": 3}, {"backward": 3}]


def test_weights_in_no_group_share_launches_up_to_a_size(monkeypatch):
    monkeypatch.setattr(compiled_graphs, "SHARED_BYTES", 2 * 64 * 64 * 4)
    sizes = (64, 64, 64, 65, 64, 8, 8, 8)  # outputs: the fourth exceeds what may be shared alone
    layers = [wnkernel.weight_norm(nn.Linear(64, n)) for n in sizes]

    def weights() -> list[Tensor]:
        return [layer.weight for layer in layers]

    run, graphs = compiled(weights)
    assert all(map(torch.equal, run(), weights()))
    # 64 + 64 | 64 | 65 | 64 + 8 + 8 + 8: what does not fit begins the next.
    assert graphs.found[0] == {"forward": 2, "forward_one": 2}


@layers_in_graphs
def test_frozen_parts_and_unread_weights(apart):
    m, twin, _ = twins()
    for each in (m, twin):
        each[0][0].parametrizations.weight.original0.requires_grad_(False)
        each[0][2].parametrizations.weight.original1.requires_grad_(False)
        for p in each[2][2].parametrizations.weight.parameters():
            p.requires_grad_(False)

    run, graphs = compiled(m)
    x = input_of_model()
    for module, f in ((m, run), (twin, twin)):
        f(x).sum().backward()
        assert module[0][0].parametrizations.weight.original0.grad is None
    for a, b in zip(m.parameters(), twin.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)
    # The frozen weight is computed without a norm, in the same launch.
    assert graphs.found == ONE_EACH

    only_first, graphs = compiled(lambda x: m[0](x))
    assert torch.equal(only_first(x), twin[0](x))
    assert graphs.found[0] == {"forward": 1}


@since("2.5", "AOTAutograd of torch 2.4 fails where a graph writes to an input that it has twice")
@pytest.mark.parametrize("fused", [False, True])
def test_a_parameter_that_the_graph_changes(fused):
    """A read after the change is a launch of its own; nothing is out of date."""
    m = nn.Sequential(*(wnkernel.weight_norm(nn.Linear(3, 3)) for _ in range(3)))
    if fused:
        wnkernel.fuse(m)

    def run(x: Tensor) -> Tensor:
        y = m(x)
        with torch.no_grad():
            m[1].parametrizations.weight.original0.mul_(2)
        return y + m(x)

    f, _ = compiled(run)
    x = torch.randn(2, 3)
    with torch.no_grad():
        before = [p.clone() for p in m.parameters()]
        got = f(x)
        for p, value in zip(m.parameters(), before, strict=True):
            p.copy_(value)
        assert torch.equal(got, run(x))


def test_weights_that_depend_on_one_another():
    """The direction of one is computed from the other: they cannot be in one launch."""
    v, g, h = randn((4, 5)), randn_g((4, 5), 0), randn_g((4, 5), 1)
    u = randn((6, 3))
    leaves = [t.requires_grad_() for t in (v, g, h, u)]

    def f(v: Tensor, g: Tensor, h: Tensor, u: Tensor) -> list[Tensor]:
        w = F.weight_norm(v, g)
        return [F.weight_norm(torch.tanh(w), h, 1), F.weight_norm(u, u[:, :1])]

    run, graphs = compiled(f)
    for got, want in zip(run(*leaves), f(*leaves), strict=True):
        assert torch.equal(got, want)
    got, want = (
        torch.autograd.grad([w.square().sum() for w in k(*leaves)], leaves) for k in (run, f)
    )
    assert_same(list(got), list(want))
    assert graphs.found == [{"forward": 1, "forward_one": 1}, {"backward": 1, "backward_one": 1}]


def test_launches_of_other_dtypes():
    v, g = randn((4, 5)), randn_g((4, 5), 0)

    def f(v: Tensor, g: Tensor) -> list[Tensor]:
        return [F.weight_norm(v, g, out_dtype=t) for t in (None, torch.bfloat16) for _ in range(2)]

    run, graphs = compiled(lambda v, g: [2 * w for w in f(v, g)] + f(v + 1, g))
    want = [2 * w for w in f(v, g)] + f(v + 1, g)
    for got, expected in zip(run(v, g), want, strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
    assert set(graphs.found[0]) == {"forward"}


@layers_in_graphs
@pytest.mark.parametrize("how", [copy.deepcopy, lambda part: pickle.loads(pickle.dumps(part))])
def test_a_copy_of_a_part_is_in_no_group(how, apart):
    m = model()
    wnkernel.fuse(m, autocast=True)
    part, x = how(m[0]), input_of_model()
    run, graphs = compiled(lambda: [part[0].weight, part[2].weight])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for got, want in zip(run(), (part[0].weight, part[2].weight), strict=True):
            assert got.dtype == want.dtype
            assert torch.equal(got, want)
    assert graphs.found == [{"weight_norm": 2}]
    whole = how(m)
    run, graphs = compiled(whole)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(run(x), m(x))
    assert graphs.found == [{"forward": 1}]


@needs("backward in graphs")
def test_a_whole_training_step():
    """The graph ends with writes to all parameters."""
    m, twin, _ = twins()

    def train(module: nn.Module, x: Tensor) -> None:
        module(x).square().sum().backward()
        with torch.no_grad():
            for p in module.parameters():
                p.sub_(0.1 * p.grad)
                p.grad = None

    graphs = Graphs()
    with torch._dynamo.config.patch(compiled_autograd=True):
        run = torch.compile(train, backend=graphs)
        for _ in range(2):
            x = input_of_model()
            run(m, x)
            train(twin, x)
    assert_same(list(m.parameters()), list(twin.parameters()))
    assert sum(graphs.found, Operators()) == {"forward": 1, "backward": 1}


@layers_in_graphs
def test_checkpointed_blocks(apart):
    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    m, twin = (
        Net(*(Checkpointed(*(wnkernel.weight_norm(nn.Linear(6, 6)) for _ in range(2))), nn.Tanh()))
        for _ in range(2)
    )
    twin.load_state_dict(m.state_dict())
    wnkernel.fuse(m)
    run, graphs = compiled(m)
    x = torch.randn(2, 6)
    assert_same(step(run, m, x), step(twin, twin, x))
    forward, backward = graphs.found
    assert forward == {"forward": 1}
    assert backward == {"forward": 1, "backward": 1}


def test_two_models_in_one_graph():
    a, b = model(), nn.Sequential(wnkernel.weight_norm(nn.Linear(2, 3)), nn.Tanh())
    wnkernel.fuse(a), wnkernel.fuse(b)
    both = nn.Sequential(a, b)
    run, graphs = compiled(both)
    x = input_of_model()
    assert_same(step(run, both, x), step(both, both, x))
    assert graphs.found == ONE_EACH


def test_what_runs_eagerly_between_is_not_touched():
    """A compiled part of a fused model is a launch of its own."""
    m, twin, _ = twins()
    graphs = Graphs()
    m[2].compile(backend=graphs, fullgraph=True)
    x = input_of_model()
    for _ in range(3):
        assert_same(step(m, m, x), step(twin, twin, x))
        change(m, twin)
    assert graphs.found == ONE_EACH


def test_the_same_graph_without_the_pass(apart):
    """The pass changes no bit."""
    m, twin, _ = twins()
    x = input_of_model()
    graphs = Graphs(merge=False)
    run = torch.compile(m, backend=graphs, fullgraph=True)
    assert_same(step(run, m, x), step(twin, twin, x))
    assert graphs.found == [{"forward_one": 5}, {"backward_one": 5}]
