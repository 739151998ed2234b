"""Sharded layers: torch loads their g and v, and a plain weight is not taken apart."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import fsdp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh

import wnkernel

from ..checkpoints import g_and_v, load_error, loaded, nothing_loaded, ours, saved
from ..versions import DTensor, needs

pytestmark = needs("fully_shard")


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def linear():
    return nn.Linear(5, 4)


@pytest.fixture
def sharded(mesh):
    """A layer whose g and v are DTensors."""
    layer = fsdp.fully_shard(ours(linear()), mesh=mesh)
    assert all(isinstance(t, DTensor) for t in loaded(layer))
    return layer


def full(layer):
    return [t.full_tensor() for t in loaded(layer)]


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("layout", ["parametrized", "legacy"])
def test_sharded_pairs_load_from_both_layouts(mesh, sharded, layout, assign):
    source = ours(linear())
    source.load_state_dict(saved(linear(), "legacy"))
    want = [t.clone() for t in loaded(source)]
    source = fsdp.fully_shard(source, mesh=mesh)
    checkpoint = wnkernel.convert_state_dict(source.state_dict(), layout)
    assert all(isinstance(t, DTensor) for t in checkpoint.values())
    sharded.load_state_dict(checkpoint, strict=True, assign=assign)
    for got, t in zip(full(sharded), want, strict=True):
        assert torch.equal(got, t)


def test_a_whole_checkpoint_is_distributed_by_torch(sharded):
    checkpoint = saved(linear(), "legacy")
    set_model_state_dict(
        sharded,
        wnkernel.convert_state_dict(checkpoint),
        options=StateDictOptions(full_state_dict=True),
    )
    assert torch.equal(full(sharded)[1], checkpoint["weight_v"])
    state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    assert torch.equal(wnkernel.convert_state_dict(state, "legacy")["weight_g"], full(sharded)[0])


@pytest.mark.parametrize("layout", ["parametrized", "legacy"])
def test_what_is_not_sharded_is_refused_by_torch_and_leaves_both(sharded, layout):
    before = full(sharded)
    error = load_error(lambda: sharded.load_state_dict(saved(linear(), layout)))
    assert f'the parameter named "{g_and_v()[0]}"' in error
    assert all(torch.equal(a, b) for a, b in zip(full(sharded), before, strict=True))


def test_a_plain_weight_is_not_split(sharded, mesh):
    before, plain = full(sharded), linear()
    assert "sharded layer cannot split" in load_error(
        lambda: sharded.load_state_dict(plain.state_dict(), strict=False)
    )
    dtensors = fsdp.fully_shard(copy.deepcopy(plain), mesh=mesh).state_dict()
    error = load_error(lambda: sharded.load_state_dict(dtensors, strict=False))
    assert 'weight: expected g and v, got the plain weight "weight"' in error
    assert "convert_state_dict" in error
    assert all(torch.equal(a, b) for a, b in zip(full(sharded), before, strict=True))
    converted = wnkernel.convert_state_dict(plain.state_dict(), like=ours(linear()))
    set_model_state_dict(sharded, converted, options=StateDictOptions(full_state_dict=True))
    assert torch.equal(full(sharded)[1], plain.weight)


def test_a_sharded_plain_weight_is_not_split(mesh):
    target, checkpoint = ours(linear()), fsdp.fully_shard(linear(), mesh=mesh).state_dict()
    with nothing_loaded(target.parametrizations):
        error = load_error(lambda: target.load_state_dict(checkpoint))
    assert "sharded layer cannot split" in error
