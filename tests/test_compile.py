"""torch.compile without graph breaks or recompilation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrize

import wnkernel
from wnkernel import functional as F

from .cases import randn, randn_g
from .compiled import by_inductor


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def model(dim=0):
    return nn.Sequential(
        wnkernel.weight_norm(nn.Conv1d(2, 4, 3), dim=dim),
        nn.Tanh(),
        wnkernel.weight_norm(nn.ConvTranspose1d(4, 3, 2), dim=dim),
        nn.Flatten(),
        wnkernel.weight_norm(nn.Linear(21, 2), dim=dim),
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
