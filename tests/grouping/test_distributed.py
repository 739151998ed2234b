"""fuse() with DistributedDataParallel, fully_shard, FullyShardedDataParallel and DataParallel.

Two processes train a fused and wrapped model beside one that is wrapped only (the same bits) and
one that is neither, on all data (the same up to the order of summation).
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp import ShardingStrategy
from torch.nn.parallel import DistributedDataParallel as DDP

import wnkernel

from .. import distributed_worker
from ..distributed_worker import (
    ALL,
    ORDERS,
    WORLD,
    Launched,
    Net,
    assert_close,
    assert_no_failures,
    assert_same,
    check,
    each,
    fused,
    inputs,
    loss,
    matrices,
    net,
    one_backward,
    share,
    train,
)
from ..groups import REUSE
from ..processes import PATIENCE_S

BOTH = [(order, reuse) for order in ORDERS for reuse in REUSE]


@each(*BOTH)
def ddp(order: str, reuse: str) -> None:
    assert check(DDP, order, reuse=reuse) == 3 * [ALL]


@each(*BOTH)
def ddp_accumulates_without_sync(order: str, reuse: str) -> None:
    """With "version" the one node of a step runs backward three times."""

    def step(model: nn.Module, x: Callable[[int], Tensor], k: int) -> None:
        for part in range(3):
            synced = part == 2 or not isinstance(model, DDP)
            with nullcontext() if synced else model.no_sync():
                loss(model(x(part))).backward()

    launched = check(DDP, order, step=step, reuse=reuse)
    assert launched == (9 if reuse == "forward" else 3) * [ALL]


SKIPPED = {
    "in every other step": lambda k, rank: k % 2 == 1,
    "in the first step": lambda k, rank: k == 0,
    "by one process": lambda k, rank: k % 2 == rank,
}


@each(*((skipped, *both) for skipped in SKIPPED for both in (BOTH[0], BOTH[3])))
def ddp_with_layers_skipped(skipped: str, order: str, reuse: str) -> None:
    """Their gradients are None as without a group, though a node computes for all layers."""

    def skip(k: int, rank: int) -> list[str]:
        return ["second"] if SKIPPED[skipped](k, rank) else []

    def step(model: nn.Module, x: Callable[[int], Tensor], k: int) -> None:
        loss(model(x(0), *skip(k, dist.get_rank()))).backward()

    def reference(model: nn.Module, x: Callable[[int], Tensor], k: int) -> None:
        parts = enumerate(x(0).chunk(WORLD))
        loss(torch.cat([model(part, *skip(k, rank)) for rank, part in parts])).backward()

    def wrap(model: nn.Module) -> nn.Module:
        return DDP(model, find_unused_parameters=True)

    check(wrap, order, step=step, reference=reference, reuse=reuse)


@each(("fuse first",), ("wrap first",))
def ddp_with_buckets(order: str) -> None:
    """The last layers make a launch of their own, so their gradients can be sent first."""
    launched = check(DDP, order, bucket_cap_mb=4e-4)
    buckets = [
        {"first.0.weight"},
        {"first.2.weight", "second.0.weight"},
        {"second.2.weight", "middle.weight", "last.weight"},
    ]
    assert launched == 3 * buckets


@each(("gradient_as_bucket_view",), ("static_graph",))
def ddp_with_option(option: str) -> None:
    for reuse in REUSE:
        check(lambda model: DDP(model, **{option: True}), "fuse first", reuse=reuse)


@each(())
def ddp_with_a_static_graph_and_a_layer_that_is_never_used() -> None:
    """The first launch computes all layers, the others those that are used: another graph."""
    model = net()
    wnkernel.fuse(model)
    model = DDP(model, static_graph=True)
    x = share(inputs(0))
    for _ in range(2):
        loss(model(x, "second")).backward()
    with pytest.raises(RuntimeError, match="your training graph has changed"):
        model(x, "second")


@each(*((reuse,) for reuse in REUSE))
def ddp_sends_parameters_when_it_is_made(reuse: str) -> None:
    model = net(seed=dist.get_rank())
    wnkernel.fuse(model, reuse=reuse)
    x = inputs(0)
    model(x)
    assert torch.equal(DDP(model)(x), net(seed=0)(x))


@each(("fuse first",), ("wrap first",))
def ddp_compiled(order: str) -> None:
    def wrap(model: nn.Module) -> nn.Module:
        torch.compiler.reset()
        return torch.compile(DDP(model), backend="eager")

    assert check(wrap, order) == []


@each(
    *(
        (*both, original, strategy)
        for both in BOTH
        for original in (True, False)
        for strategy in ("FULL_SHARD", "SHARD_GRAD_OP")
    )
)
def fsdp1(order: str, reuse: str, original: bool, strategy: str) -> None:
    """FullyShardedDataParallel: parameters are views into one that is gathered and freed."""

    def shard(module: nn.Module) -> FSDP1:
        return FSDP1(
            module,
            use_orig_params=original,
            sharding_strategy=ShardingStrategy[strategy],
            device_id=torch.device("cpu"),
        )

    def wrap(model: Net) -> FSDP1:
        model.first, model.second = shard(model.first), shard(model.second)
        return shard(model)

    def trained(model: nn.Module) -> list[dict[str, Tensor]]:
        is_sharded = isinstance(model, FSDP1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for k in range(6):
            loss(model(share(inputs(k)) if is_sharded else inputs(k))).backward()
            if k % 2:
                optimizer.step()
                optimizer.zero_grad()
        with FSDP1.summon_full_params(model) if is_sharded else nullcontext():
            return [{key: t.clone() for key, t in model.state_dict().items()}]

    got = trained(fused(matrices(), wrap, order, reuse=reuse)[0])
    assert_same(got, trained(wrap(matrices())))
    assert_close(got, trained(matrices()))


@pytest.mark.parametrize("family", ["ddp", "fsdp1"])
def test_two_processes(family, tmp_path):
    assert_no_failures(__name__, family, tmp_path)


def test_data_parallel_without_devices_is_the_model_itself():
    model, twin = net(), net()
    wnkernel.fuse(model)
    x = inputs(0)
    with Launched() as launched:
        got = train(nn.DataParallel(model), one_backward, inputs)
    want = train(twin, one_backward, inputs)
    assert_same(got, want)
    assert launched.names == 3 * [ALL]
    assert torch.equal(nn.DataParallel(model)(x), twin(x))


def replicate(model: nn.Module) -> nn.Module:
    """One replica as DataParallel makes them, with copies of the parameters that autograd knows."""
    modules = list(model.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module in modules:
        for name, child in module._modules.items():
            replicas[module]._modules[name] = child and replicas[child]
        for name, p in module._parameters.items():
            setattr(replicas[module], name, p if p is None else p.clone())
    return replicas[model]


def test_nobody_waits_long_for_a_process_whose_peer_has_ended(monkeypatch):
    monkeypatch.setattr(distributed_worker, "FINISHED_S", 0.1)
    codes = "pass", f"import time; time.sleep({PATIENCE_S})"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for code in codes]
    ended = distributed_worker.wait(processes, time.monotonic() + 2 * PATIENCE_S)
    assert ended == ["which ended with status 0", "which hung"]


@pytest.mark.parametrize("reuse", REUSE)
def test_replicas_of_data_parallel_compute_alone(reuse):
    """They share hooks and __dict__ entries with the model, whose own forward runs meanwhile."""
    model, twin = net(), net()
    wnkernel.fuse(model, reuse=reuse)
    x = [inputs(k) for k in range(4)]
    started = threading.Barrier(len(x))
    outputs: dict[int, Tensor] = {}

    def run(k: int, module: nn.Module) -> None:
        started.wait(PATIENCE_S)
        for _ in range(5):
            outputs[k] = module(x[k])

    with Launched() as launched:
        modules = [model, *(replicate(model) for _ in x[1:])]
        threads = [threading.Thread(target=run, args=item) for item in enumerate(modules)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert launched.names == (5 if reuse == "forward" else 1) * [ALL]
    for k in range(len(x)):
        assert torch.equal(outputs[k], twin(x[k]))
    torch.stack([loss(y) for _, y in sorted(outputs.items())]).mean().backward()
    loss(torch.cat([twin(part) for part in x])).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
