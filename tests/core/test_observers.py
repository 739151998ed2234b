"""What is computed where others look at tensors: DTensors, in compiled code too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from wnkernel import functional

from ..versions import DTensor, Replicate, distribute_tensor, needs

SHAPES = ((6, 5), (4, 3, 2))


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def weights(mesh: DeviceMesh) -> tuple[list[Tensor], list[Tensor]]:
    """The v and g of two weights, of which the second is one of DTensors."""
    torch.manual_seed(0)
    v = [torch.randn(shape) for shape in SHAPES]
    g = [torch.randn(shape[0], *[1] * (len(shape) - 1)) for shape in SHAPES]
    v[1], g[1] = (distribute_tensor(t, mesh, [Replicate()]) for t in (v[1], g[1]))
    return v, g


@needs("sharded weights")
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_compiled_list_with_dtensors_is_that_of_single_weights(mesh, compiler):
    def compute(v: list[Tensor], g: list[Tensor]) -> list[Tensor]:
        return functional.weight_norms(v, g, [0, 0])

    v, g = weights(mesh)
    want = [functional.weight_norm(*weight) for weight in zip(v, g, strict=True)]
    got = torch.compile(compute, backend=compiler, fullgraph=True)(v, g)
    assert [type(w) for w in got] == [Tensor, DTensor]
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1].full_tensor(), want[1].full_tensor())
