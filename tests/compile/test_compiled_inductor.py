"""The pass over weight norms in Inductor itself: beside the passes of others, with its caches, its
modes, its C++ wrapper."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch._inductor.config as config
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters

import wnkernel
from wnkernel import functional as F
from wnkernel import native
from wnkernel.compiled_graphs import INFERENCE_AWARE, SLOT, GraphPass, _pass_types, install

from ..compiled import by_inductor
from ..graphs import Operators, operators
from ..versions import needs, since

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.skipif(not native.loaded(), reason="without wnkernel._C there are no operators"),
]


def model() -> nn.Module:
    """Whose operators are torch's own, but for the weight norms: there is nothing to generate."""
    m = nn.Sequential(*(wnkernel.weight_norm(nn.Conv1d(4, 4, 3), dim=d) for d in (0, 1, None)))
    wnkernel.fuse(m)
    return m


def step(run: Callable, m: nn.Module, x: Tensor) -> list[Tensor]:
    m.zero_grad()
    y = run(x)
    y.sum().backward()
    return [y.detach(), *(p.grad.clone() for p in m.parameters())]


@pytest.fixture
def found() -> Iterator[list[Operators]]:
    """Operators of the graphs that Inductor has after its passes."""
    graphs: list[Operators] = []

    def keep(graph: fx.Graph) -> None:
        graphs.append(operators(graph))

    with config.patch(post_grad_custom_post_pass=keep, fx_graph_cache=False):
        yield graphs


ONE_EACH = [{"forward": 1}, {"backward": 1}]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_modes(mode, found):
    m, x = model(), torch.randn(2, 4, 20)
    run = torch.compile(m, fullgraph=True, mode=mode)
    for _ in range(3):
        got, want = step(run, m, x), step(m, m, x)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            for p in m.parameters():
                p.mul_(0.9)
    assert found == ONE_EACH


@needs("cpp_wrapper")
def test_cpp_wrapper(found):
    """Its generated C++ code takes lists, but no results that are lists of lists."""
    m, x = model(), torch.randn(2, 4, 20)
    with config.patch(cpp_wrapper=True):
        torch.testing.assert_close(step(by_inductor(m), m, x), step(m, m, x), rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(by_inductor(m)(x), m(x), rtol=1e-4, atol=1e-5)
    assert found[:2] == ONE_EACH


def test_strides_of_what_the_graph_computes(found):
    """Inductor lays out its own results as it likes; operators get them as they are promised."""

    def f(a: Tensor, g: Tensor) -> list[Tensor]:
        return F.weight_norm(torch.sin(a.t()), g), F.weight_norm(torch.cos(a.t()), g)

    a, g = torch.randn(5, 4), torch.rand(4, 1)
    got, want = by_inductor(f)(a, g), f(a, g)
    for x, y in zip(got, want, strict=True):
        assert x.stride() == y.stride()
        torch.testing.assert_close(x, y)
    assert found == [{"forward": 1}]


class Counts:
    """A pass of somebody else."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, graph: fx.Graph) -> None:
        self.calls += 1


@pytest.mark.parametrize("when", ["before", "in between"])
def test_the_pass_of_somebody_else_runs_too(when, found):
    theirs = Counts()
    m, x = model(), torch.randn(2, 4, 20)
    if when == "in between":
        other = copy.deepcopy(m)
        step(by_inductor(other), other, x)
        found.clear()
        torch.compiler.reset()
    with config.patch({SLOT: theirs}):
        step(by_inductor(m), m, x)
    assert theirs.calls == 2
    assert found == ONE_EACH


def test_a_pass_that_knows_what_a_graph_is_for(found):
    aware = getattr(_pass_types(), INFERENCE_AWARE, None)
    if aware is None:
        pytest.skip("this torch has no passes that know inference")
    seen = []

    class Pass(aware):
        def __call__(self, graph: fx.Graph, is_inference: bool) -> None:
            seen.append(is_inference)

        def uuid(self) -> str:
            return "theirs"

    m, x = model(), torch.randn(2, 4, 20)
    with config.patch({SLOT: Pass()}):
        step(by_inductor(m), m, x)
        with torch.no_grad():
            by_inductor(m)(x)
    assert seen == [False, False, True]
    assert found == [*ONE_EACH, {"forward": 1}]


@since("2.7", "before torch 2.7 the options of torch.compile take no pass")
def test_a_pass_in_the_options_of_torch_compile_is_alone_in_the_backward(found):
    """Inductor sets what stands there anew, and no operator is traced after that."""
    theirs = Counts()
    m, x = model(), torch.randn(2, 4, 20)
    step(torch.compile(m, fullgraph=True, options={SLOT: theirs}), m, x)
    assert theirs.calls == 2
    assert found == [{"forward": 1}, {"backward_one": 3}]


def test_the_pass_is_there_once():
    with config.patch({SLOT: None}):
        install()
        first = getattr(config, SLOT)
        assert isinstance(first, GraphPass)
        install()
        assert getattr(config, SLOT) is first
        again = pickle.loads(pickle.dumps(first))  # for Inductor in a process of its own
        assert isinstance(again, GraphPass)
        assert again.uuid() == first.uuid()


@since("2.6", "before torch 2.6 a pass has no uuid()")
def test_graphs_with_a_pass_that_cannot_be_cached_are_not():
    class Named(Counts):
        def uuid(self) -> str:
            return "theirs"

    ours = GraphPass(None).uuid()
    assert ours is not None
    assert GraphPass(Counts()).uuid() is None
    assert GraphPass([Named(), Counts()]).uuid() is None
    assert GraphPass((Named(),)).uuid() not in (None, ours)


def test_caches(tmp_path: Path, monkeypatch):
    """Cold, then warm: the second graph is read from the disk, and computes the same."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    m, x = model(), torch.randn(2, 4, 20)
    results, hits = [], []
    for _ in range(2):
        torch.compiler.reset()
        counters.clear()
        with config.patch(fx_graph_cache=True):
            results.append(step(by_inductor(m), m, x))
        hits.append(counters["inductor"]["fxgraph_cache_hit"])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)
    assert hits == [0, 2]
