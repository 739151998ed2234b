"""fully_shard of models with one norm over the whole tensor: it refuses 0-dimensional parameters,
and takes g of shape (1,). Two processes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed import fsdp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)

import wnkernel

from ..distributed_worker import (
    ORDERS,
    UNITS,
    Net,
    Record,
    assert_close,
    assert_no_failures,
    assert_same,
    check,
    each,
    inputs,
    net,
    one_backward,
    share,
    train,
    whole,
)
from ..groups import REUSE
from ..versions import fully_shard_on_cpus

pytestmark = fully_shard_on_cpus

G = "first.2.parametrizations.weight.original0"


def reshape_g(model: nn.Module) -> nn.Module:
    """As docs/fuse.md says."""
    p = model.first[2].parametrizations.weight
    p.original0 = nn.Parameter(p.original0.reshape(1))
    return model


def build() -> Net:
    return reshape_g(net())


def blocks(model: Net, **options: object) -> Net:
    for block in (model.first, model.second):
        fsdp.fully_shard(block, **options)
    return fsdp.fully_shard(model, **options)


def as_scalar(record: Record) -> Record:
    return [entries | {G: entries[G].reshape(())} for entries in record]


@each(())
def whole_tensor_is_refused_with_a_scalar() -> None:
    with pytest.raises(ValueError, match="1D tensor with numel equal to 1"):
        blocks(net())


@each(())
def whole_tensor_unfused() -> None:
    got = train(blocks(build()), one_backward, lambda *of: share(inputs(*of)))
    assert [entries[G].shape for entries in got] == 4 * [(1,)]
    assert_close(as_scalar(got), train(net(), one_backward, inputs))


@each(*((order, reuse) for order in ORDERS for reuse in REUSE))
def whole_tensor_fused(order: str, reuse: str) -> None:
    assert check(blocks, order, build=build, reuse=reuse) == 3 * UNITS


@each(())
def whole_tensor_in_bfloat16() -> None:
    options = {"mp_policy": fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16)}
    model, twin = build(), blocks(build(), **options)
    wnkernel.fuse(model)
    model = blocks(model, **options)
    got, want = (train(m, one_backward, lambda *of: share(inputs(*of))) for m in (model, twin))
    assert_same(got, want)


@each(())
def whole_tensor_with_state_dicts() -> None:
    """One that a plain model with a scalar g wrote, and the way back."""
    options = StateDictOptions(full_state_dict=True)
    source, model = net(seed=1), blocks(build())
    state = wnkernel.convert_state_dict(source.state_dict(), like=build())
    set_model_state_dict(model, state, options=options)
    x = inputs(0)
    torch.testing.assert_close(model(x), source(x))
    for name, p in source.named_parameters():
        assert torch.equal(whole(dict(model.named_parameters())[name]).reshape(p.shape), p), name
    gathered = get_model_state_dict(model, options=options)
    target = net(seed=2)
    target.load_state_dict(gathered)
    assert torch.equal(target(x), source(x))


def test_two_processes(tmp_path):
    assert_no_failures(__name__, "whole_tensor", tmp_path)
