"""Compiled code, function transforms, DTensors, and norms in memory that is written to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from wnkernel import normalize_, normalize_after_step

from ..cases import randn
from ..torch_modes import Dispatches
from ..versions import Replicate, distribute_tensor
from .expected import assert_normal, assert_norms

SHAPE = (6, 5)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled(fresh_compiler: None, route: str, compiler: str) -> None:
    """Inputs are written, in a list, by name of a rule, by number and by tensor."""

    def function(xs: list[Tensor], norm: Tensor) -> tuple[list[Tensor], Tensor]:
        found = normalize_(xs, [0, None, 1], norm=["sqrt_numel", 2.0, norm], return_norms=True)
        return found, xs[0].sum()

    compiled = torch.compile(function, backend=compiler, fullgraph=True)
    for _ in range(2):
        xs = [randn(SHAPE), randn((4, 3), torch.bfloat16), randn((7, 5, 3), layout="transposed")]
        before, norm = [x.clone() for x in xs], randn((1, 5, 1))
        found, total = compiled(xs, norm)
        for x, b, dim, r, n in zip(
            xs, before, [0, None, 1], [5**0.5, 2.0, norm], found, strict=True
        ):
            assert_normal(x, b, dim, r)
            assert_norms(n, b, dim)
        torch.testing.assert_close(total, xs[0].sum())


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_with_parameters(fresh_compiler: None, compiler: str) -> None:
    p = nn.Parameter(randn(SHAPE))
    before = p.detach().clone()

    def function(p: Tensor) -> None:
        with torch.no_grad():
            normalize_(p, norm=2.0)

    torch.compile(function, backend=compiler, fullgraph=True)(p)
    assert_normal(p.detach(), before, 0, 2.0)


def test_a_compiled_step(fresh_compiler: None) -> None:
    m = nn.Linear(5, 4)
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
    normalize_after_step(optimizer)
    m(randn((2, 5))).sum().backward()
    torch.compile(optimizer.step, backend="eager")()
    torch.testing.assert_close(m.weight.norm(dim=1), torch.ones(4))


def test_functionalize(route: str) -> None:
    def in_place(x: Tensor) -> Tensor:
        y = x.clone()
        normalize_(y, norm=2.0)
        return y

    x = randn(SHAPE)
    assert_normal(torch.func.functionalize(in_place)(x), x, 0, 2.0)


@pytest.mark.parametrize("mode", [nullcontext, Dispatches])
def test_norms_in_a_list_that_is_written(route: str, mode: Any) -> None:
    a, b = randn(SHAPE), randn(SHAPE)
    before = [a.clone(), b.clone()]
    with mode():
        normalize_([a, b], norm=[b[:, 2:3], a[:, :1]])
    assert_normal(a, before[0], 0, before[1][:, 2:3])
    assert_normal(b, before[1], 0, before[0][:, :1])


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_dtensors_and_plain_norms_do_not_mix(mesh: DeviceMesh) -> None:
    """An error, or the result; in no case a list that is written in part."""
    x = torch.randn(SHAPE, device="cpu")
    t = distribute_tensor(x.clone(), mesh, [Replicate()])
    plain, r = x.clone(), torch.full((6, 1), 2.0, device="cpu")
    try:
        normalize_([plain, t], norm=[1.0, r])
    except (TypeError, ValueError, RuntimeError):
        assert torch.equal(plain, x)
    else:
        assert_normal(t.full_tensor(), x, 0, 2.0)
    with pytest.raises((TypeError, ValueError), match=r"^norm\[0\]: expected"):
        normalize_([plain], norm=[distribute_tensor(r, mesh, [Replicate()])])


def test_norms_of_a_norm_of_one_element(backend: str) -> None:
    """The shape of what is returned is that of norm_except_dim."""
    x = randn(SHAPE)
    assert normalize_(x, None, norm=torch.ones(1), return_norms=True).shape == ()
