"""Tensor parallelism of torch, by its styles, in two processes: an error that names fold and leaves
everything as it was, and the same as for plain layers after it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import wnkernel

from ..distributed_worker import WORLD, assert_no_failures, each
from ..versions import DTensor, Replicate, Shard, distribute_module, distribute_tensor, needs, since

STYLES = {
    "ColwiseParallel": {"up": ColwiseParallel()},
    "RowwiseParallel": {"down": RowwiseParallel()},
    "SequenceParallel": {"up": SequenceParallel()},
    "both": {"up": ColwiseParallel(), "down": RowwiseParallel()},
}


class Block(nn.Module):
    """That of a transformer, with weight norm on what is parallelised."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = wnkernel.weight_norm(nn.Linear(8, 16, bias=bias))
        self.down = wnkernel.weight_norm(nn.Linear(16, 8, bias=bias), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.norm(x)).relu())


def block(**options: bool) -> Block:
    torch.manual_seed(0)
    return Block(**options)


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (WORLD,))


def x() -> Tensor:
    return torch.linspace(-1, 1, 32).sin().view(4, 8)


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


@each(*((style, bias, frozen) for style in STYLES for bias in (True, False) for frozen in (0, 1)))
def unfolded_is_an_error(style: str, bias: bool, frozen: int) -> None:
    model = block(bias=bias).requires_grad_(not frozen)
    want, before = model(x()), dict(model.named_parameters())
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(RuntimeError, match=r"Parallel: expected a layer with a plain .*\.fold"):
        parallelize_module(model, mesh(), STYLES[style])
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is p and not isinstance(p.data, DTensor) for name, p in before.items())
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert torch.equal(model(x()), want)


@each((True,), (False,))
def parallel_folded_works(bias: bool) -> None:
    model, plain = block(bias=bias), block(bias=bias)
    want = plain(x())
    want.square().sum().backward()
    wnkernel.fold(plain)
    wnkernel.fold(model)
    model = parallelize_module(model, mesh(), STYLES["both"])
    got = model(x())
    torch.testing.assert_close(whole(got), want)
    got.square().sum().backward()
    assert [model.up.weight.placements, model.down.weight.placements] == [(Shard(0),), (Shard(1),)]
    plain(x()).square().sum().backward()
    torch.testing.assert_close(whole(model.up.weight.grad), plain.up.weight.grad)
    torch.testing.assert_close(whole(model.down.weight.grad), plain.down.weight.grad)


@each(())
def parallel_other_layers_of_a_model() -> None:
    model = block()
    want = model(x())
    plan = {"norm": SequenceParallel(use_local_output=True, sequence_dim=0)}
    parallelize_module(model, mesh(), plan)
    assert isinstance(model.norm.weight, DTensor)
    rows = x().chunk(WORLD)[dist.get_rank()]
    torch.testing.assert_close(model(rows), want.chunk(WORLD)[dist.get_rank()])


@each(())
def parallel_inputs_are_prepared_for_a_normed_layer() -> None:
    """A style that changes no parameters."""
    model = block()
    want = model.up(x())
    prepare = PrepareModuleInput(
        input_layouts=Shard(0), desired_input_layouts=Replicate(), use_local_output=True
    )
    parallelize_module(model.up, mesh(), prepare)
    torch.testing.assert_close(model.up(x().chunk(WORLD)[dist.get_rank()]), want)


@each(())
def replicated_by_distribute_module() -> None:
    """Which gives each module its own parameters, g and v included."""
    model, plain = block(), block()
    distribute_module(model, mesh())
    got = model(distribute_tensor(x(), mesh(), [Replicate()]))
    torch.testing.assert_close(got.full_tensor(), plain(x()))
    got.square().sum().backward()
    plain(x()).square().sum().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert isinstance(p, DTensor)
        torch.testing.assert_close(whole(p.grad), q.grad)


@each(())
def parallel_sharded_by_hand() -> None:
    """g and v as DTensors: right, and what a style for weight norm would do."""
    model, plain = block(), block()
    for layer, placements in ((model.up, [Shard(0)]), (model.down, [Shard(1)])):
        p = layer.parametrizations.weight
        for name in ("original0", "original1"):
            t = getattr(p, name)
            setattr(p, name, nn.Parameter(distribute_tensor(t.detach(), mesh(), placements)))
    for ours, theirs in ((model.up, plain.up), (model.down, plain.down)):
        torch.testing.assert_close(ours.weight.full_tensor(), theirs.weight)
        ours.weight.square().sum().backward()
        theirs.weight.square().sum().backward()
        both = (layer.parametrizations.parameters() for layer in (ours, theirs))
        for p, q in zip(*both, strict=True):
            torch.testing.assert_close(whole(p.grad), q.grad)


def test_two_processes(tmp_path):
    assert_no_failures(__name__, "parallel", tmp_path)


@since("2.5", "a replicated layer norm has no backward in torch 2.4")
def test_two_processes_with_replicated_layers(tmp_path):
    assert_no_failures(__name__, "replicated", tmp_path)


@needs("tensor parallelism")
def test_two_processes_with_unfolded_layers(tmp_path):
    assert_no_failures(__name__, "unfolded", tmp_path)


@pytest.mark.parametrize("name", ["bias", "weight"])
def test_code_of_others_may_replace_a_parameter(name):
    """Only the styles are refused as a whole; by itself a parameter is, if it is the weight."""
    layer = wnkernel.weight_norm(nn.Linear(3, 2))
    assert not hasattr(layer, "_distribute_module_applied")
    layer._distribute_module_applied = True
    assert layer._distribute_module_applied is True

    class Quantized(nn.Parameter):
        pass

    new = Quantized(torch.randn_like(getattr(layer, name)))
    if name == "bias":
        layer.register_parameter(name, new)
        assert layer.bias is new
    else:
        with pytest.raises(RuntimeError, match=r"wnkernel\.fold"):
            layer.register_parameter(name, new)
