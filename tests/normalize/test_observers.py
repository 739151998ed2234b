"""normalize_ where others look at tensors: transforms, tracers, subclasses, DTensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.fx.experimental.proxy_tensor import make_fx

from wnkernel import normalize_, norms_of

from .. import reference
from ..cases import randn
from ..versions import DTensor, Replicate, Shard, distribute_tensor
from .expected import assert_normal, assert_normalizes, assert_norms, scaled

SHAPE = (6, 5)


def in_place(x: Tensor) -> Tensor:
    y = x.clone()
    normalize_(y, norm=2.0)
    return y


def test_vmap(route: str) -> None:
    xs = randn((3, *SHAPE))
    got = torch.func.vmap(in_place)(xs)
    for x, y in zip(xs, got, strict=True):
        assert_normal(y, x, r=2.0)
    by_norm = torch.func.vmap(lambda x, r: (normalize_(x, norm=r), x)[1])
    before, r = xs.clone(), randn((3, 6, 1))
    for x, y, norm in zip(before, by_norm(xs, r), r, strict=True):
        reference.assert_close("y", y, scaled(x, 0, norm))


def test_gradients_are_refused(route: str) -> None:
    """And not wrong."""
    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(RuntimeError, match=r"^tensors: expected .* does not require grad"):
            transform(lambda x: in_place(x).sum())(randn(SHAPE))


def test_forward_mode(route: str) -> None:
    x, tangent = randn(SHAPE, torch.float64), randn(SHAPE, torch.float64)
    got = torch.func.jvp(in_place, (x,), (tangent,))
    want = torch.func.jvp(lambda x: 2 * x / reference.norm(x, 0), (x,), (tangent,))
    torch.testing.assert_close(got, want)


def test_fake_tensors(route: str) -> None:
    x = randn(SHAPE, torch.float16)
    before = x.clone()
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        version = fake._version
        found = normalize_([fake], None, norm="sqrt_numel", return_norms=True)
        assert norms_of(fake, 1).shape == (1, 5)
    assert (found[0].shape, found[0].dtype) == ((), torch.float32)
    assert fake._version == version + 1
    assert torch.equal(x, before)


def test_what_make_fx_records(route: str) -> None:
    def function(x: Tensor) -> Tensor:
        return normalize_(x, 1, norm=2.0, return_norms=True)

    graph = make_fx(function)(randn(SHAPE))
    x = randn(SHAPE)
    before = x.clone()
    assert_norms(graph(x), before, 1)
    assert_normal(x, before, 1, 2.0)


# Other kinds of tensors


class Tagged(torch.Tensor):
    """A subclass as most are: torch's own code runs, and results are of it."""


def test_subclasses(route: str) -> None:
    x = randn(SHAPE).as_subclass(Tagged)
    before = x.as_subclass(Tensor).clone()
    normalize_([x, randn((2, 2))])
    assert type(x) is Tagged
    assert_normal(x.as_subclass(Tensor), before)


def test_tensors_whose_sign_is_in_no_memory(route: str) -> None:
    x = randn(SHAPE)
    before = x.clone()
    assert_normalizes(torch._neg_view(x), 1, 2.0)
    assert_normal(x, before, 1, 2.0)
    numbers = torch.view_as_complex(randn((4, 3, 2)))
    x, before = numbers.conj().imag, numbers.clone()
    assert x.is_neg()
    assert_normalizes(x, 1, 2.0)
    assert_normal(numbers.imag, before.imag, 1, 2.0)
    assert torch.equal(numbers.real, before.real)


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()], ids=str)
def test_dtensors(mesh: DeviceMesh, placement: Any) -> None:
    for dim in (0, 1, None):
        x = torch.randn(SHAPE, device="cpu")
        t = distribute_tensor(x.clone(), mesh, [placement])
        version, kept = t._version, norms_of(t, dim)
        found = normalize_(t, dim, norm="sqrt_numel", return_norms=True)
        assert isinstance(t, DTensor)
        assert t._version == version + 1
        assert_normal(t.full_tensor(), x, dim, (30 / found.numel()) ** 0.5)
        for norms in (found, kept):
            assert_norms(norms.full_tensor(), x, dim)
        normalize_([t], dim, norm="keep")
        torch.testing.assert_close(t.full_tensor(), x)
