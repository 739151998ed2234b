"""torch.compile without graph breaks or recompilation."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

import wnkernel
from wnkernel import functional as F

from ..cases import randn, randn_g
from ..compiled import by_inductor
from ..versions import layers_in_graphs, needs


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def model(dim=0, norm=wnkernel.weight_norm):
    return nn.Sequential(
        norm(nn.Conv1d(2, 4, 3), dim=dim),
        nn.Tanh(),
        norm(nn.ConvTranspose1d(4, 3, 2), dim=dim),
        nn.Flatten(),
        norm(nn.Linear(21, 2), dim=dim),
    )


def step(run, module, x):
    """Output and gradients of one training step."""
    module.zero_grad()
    y = run(x)
    y.square().sum().backward()
    return y, {k: p.grad.clone() for k, p in module.named_parameters()}


@pytest.mark.parametrize("dim", [0, 1, None])
def test_training_step(route, dim):
    module = model(dim)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 2, 8)
    torch.testing.assert_close(step(compiled, module, x), step(module, module, x))


def test_inductor(backend):
    module = model()
    compiled = by_inductor(module)
    x = torch.randn(2, 2, 8)
    torch.testing.assert_close(
        step(compiled, module, x), step(module, module, x), rtol=1e-4, atol=1e-5
    )


def test_ten_calls_compile_once(route):
    module = model()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    for _ in range(10):
        step(compiled, module, torch.randn(2, 2, 8))
        optimizer.step()
    assert counter.frame_count == 1


def test_compiled_sees_new_weights(route):
    module = model()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 2, 8)
    compiled(x)
    with torch.no_grad():
        for p in module.parameters():
            p.data.mul_(2)  # bumps no version
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(route, dtype):
    """Half backward under compile crashed in torch 2.11's own."""
    v, g, grad_w = randn((4, 5), dtype), randn_g((4, 5), 0, dtype), randn((4, 5), dtype)
    v.requires_grad_(), g.requires_grad_()
    f = torch.compile(lambda v, g: F.weight_norm(v, g), backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(f(v, g), (v, g), grad_w)
    want = torch.autograd.grad(F.weight_norm(v, g), (v, g), grad_w)
    torch.testing.assert_close(got, want)


EPS, OUT_DTYPE = {"eps": 4.0}, {"out_dtype": torch.bfloat16}


@pytest.mark.parametrize(
    ("dim", "options"), [(0, EPS), (1, OUT_DTYPE), (2, EPS), (None, OUT_DTYPE), (None, EPS)]
)
def test_options(route, dim, options):
    v, g = randn((4, 5, 6)), randn_g((4, 5, 6), dim)
    f = torch.compile(
        lambda v, g: F.weight_norm(v, g, dim, **options), backend="aot_eager", fullgraph=True
    )
    got, want = f(v, g), F.weight_norm(v, g, dim, **options)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want)


def test_channels_last_is_kept(route):
    v = randn((8, 6, 3, 3), layout="channels_last")
    f = torch.compile(lambda v, g: F.weight_norm(v, g), backend="aot_eager", fullgraph=True)
    got = f(v, randn_g((8, 6, 3, 3), 0))
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_dynamic_shapes(route):
    """One compilation for every size of v."""
    counter = CompileCounterWithBackend("aot_eager")
    f = torch.compile(
        lambda v, g: F.weight_norm(v, g), backend=counter, fullgraph=True, dynamic=True
    )
    compiled = []
    for rows in (4, 5, 9):
        v, g = randn((rows, rows + 3)), randn_g((rows, rows + 3), 0)
        torch.testing.assert_close(f(v, g), F.weight_norm(v, g))
        compiled.append(counter.frame_count)
    assert compiled[0] == compiled[-1]


def test_frozen_parameters(route):
    module = model()
    for norm in (m for m in module.modules() if parametrize.is_parametrized(m)):
        norm.parametrizations.weight.original0.requires_grad_(False)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    compiled(torch.randn(2, 2, 8)).sum().backward()
    for name, p in module.named_parameters():
        assert (p.grad is None) == name.endswith("original0")


def test_bad_input_is_still_refused(route):
    f = torch.compile(lambda v, g: F.weight_norm(v, g), backend="aot_eager")
    with pytest.raises(Exception, match="g: expected shape"):
        f(torch.ones(4, 3), torch.ones(1, 1))


def test_parametrization_alone(route):
    norm = wnkernel.WeightNorm(0)
    v, g = randn((4, 5)), randn_g((4, 5), 0)
    f = torch.compile(norm, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(f(g, v), norm(g, v))


def test_deepcopy_after_compile(route):
    module = model()
    x = torch.randn(2, 2, 8)
    torch.compile(module, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(copy.deepcopy(module)(x), module(x))


MODES = {
    "train": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("dynamic", [False, True])
def test_no_more_graphs_than_with_torchs(dynamic):
    """In all modes, one after the other, and in the same modes of a fused model."""
    frames, outputs = {}, {}
    for kind in ("torch", "ours", "fused"):
        torch.compiler.reset()
        torch.manual_seed(0)
        module = model(norm=weight_norm if kind == "torch" else wnkernel.weight_norm)
        if kind == "fused":
            wnkernel.fuse(module)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=dynamic)
        outputs[kind] = []
        for training in (True, False):
            module.train(training)
            for mode in MODES.values():
                with mode():
                    outputs[kind].append(compiled(torch.ones(2, 2, 8)).float())
        frames[kind] = counter.frame_count
    assert frames["ours"] <= frames["torch"]
    assert frames["fused"] <= frames["torch"]
    for kind in ("ours", "fused"):
        torch.testing.assert_close(outputs[kind], outputs["torch"], rtol=1e-2, atol=1e-2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = wnkernel.weight_norm(nn.Conv1d(2, 2, 3, padding=1))
        self.second = wnkernel.weight_norm(nn.Conv1d(2, 2, 3, padding=1), dim=None)

    def forward(self, x):
        return x + self.second(torch.tanh(self.first(x)))


@layers_in_graphs
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("make", [Block, lambda: nn.Sequential(Block(), Block())])
def test_many_blocks_compiled_one_by_one_are_one_program(make, fused):
    """Dynamo compiles a forward eight times at most, and again for each class of a layer."""
    blocks = nn.Sequential(*(make() for _ in range(10)))
    if fused:
        wnkernel.fuse(blocks)
    counter = CompileCounterWithBackend("aot_eager")
    for block in blocks:
        block.compile(backend=counter, fullgraph=True)
    blocks(torch.randn(2, 2, 8)).sum().backward()
    assert counter.frame_count == 2  # the input of the first block requires no grad


@needs("backward in graphs")
def test_a_whole_training_step_in_one_graph(route):
    """Forward, backward and optimizer."""
    results = []
    for backend in (None, "aot_eager"):
        torch.manual_seed(0)
        module = model()
        wnkernel.fuse(module)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)

        def train(x, module=module, optimizer=optimizer):
            module(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        with torch._dynamo.config.patch(compiled_autograd=backend is not None):
            run = train if backend is None else torch.compile(train, backend=backend)
            for k in range(3):
                run(torch.full((2, 2, 8), 0.1 * k))
        results.append([p.detach() for p in module.parameters()])
    torch.testing.assert_close(*results)
