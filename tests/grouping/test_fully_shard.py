"""fuse() with fully_shard: a launch never crosses what is gathered and freed as one.

Two processes train a fused and sharded model beside one that is sharded only (the same bits) and
one that is neither, on all data (the same up to the order of summation).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import fsdp

import wnkernel
from wnkernel import functional

from ..distributed_worker import (
    ALL,
    ORDERS,
    UNITS,
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
from ..versions import fully_shard_on_cpus, needs

pytestmark = fully_shard_on_cpus

BOTH = [(order, reuse) for order in ORDERS for reuse in REUSE]
RESHARD = [True, False]
"""reshard_after_forward."""


def blocks(**options: object) -> Callable[[Net], Net]:
    """Wraps the blocks, then all."""

    def wrap(model: Net) -> Net:
        for block in (model.first, model.second):
            fsdp.fully_shard(block, **options)
        return fsdp.fully_shard(model, **options)

    return wrap


def layers(**options: object) -> Callable[[Net], Net]:
    """Wraps every layer, then all."""

    def wrap(model: Net) -> Net:
        for layer in [m for m in model.modules() if isinstance(m, nn.Linear)]:
            fsdp.fully_shard(layer, **options)
        return fsdp.fully_shard(model, **options)

    return wrap


def accumulate(model: nn.Module, x: Callable[[int], Tensor], k: int, read: bool = False) -> None:
    """Three backwards, of which the last sends gradients and frees gathered parameters; perhaps
    with reads between them."""
    for part in range(3):
        if read:
            assert model.last.weight is not None
        if isinstance(model, fsdp.FSDPModule):
            model.set_requires_gradient_sync(part == 2)
            model.set_reshard_after_backward(part == 2)
        loss(model(x(part))).backward()


@each(*((*both, reshard) for both in BOTH for reshard in RESHARD))
def fully_sharded(order: str, reuse: str, reshard: bool) -> None:
    wrap = blocks(reshard_after_forward=reshard)
    assert check(wrap, order, build=matrices, reuse=reuse) == 3 * UNITS


@each(*((order,) for order in ORDERS))
def fully_sharded_units_have_a_node_each(order: str) -> None:
    seen: dict[str, object] = {}

    def note(module: nn.Module, args: object) -> None:
        seen[names[module]] = module.weight.grad_fn

    model = matrices()
    names = {m: f"{name}.weight" for name, m in model.named_modules()}
    for layer in (m for m in model.modules() if isinstance(m, nn.Linear)):
        layer.register_forward_pre_hook(note)
    fused(model, blocks(), order)[0](share(inputs(0)))
    nodes = [{seen[name] for name in unit} for unit in UNITS]
    assert [len(of_unit) for of_unit in nodes] == [1, 1, 1]
    assert len(set().union(*nodes)) == len(UNITS)


@each(*((order,) for order in ORDERS))
def fully_sharded_with_other_units(order: str) -> None:
    assert check(fsdp.fully_shard, order, build=matrices) == 3 * [ALL]
    assert all(len(names) <= 1 for names in check(layers(), order, build=matrices))
    with Launched() as launched:
        model = fused(matrices(), lambda m: fsdp.fully_shard(m.second) and m, order)[0]
        model(share(inputs(0)))
    assert launched.names == [UNITS[0] | UNITS[2], UNITS[1]]


@each(*((*both, reshard) for both in (BOTH[0], BOTH[3]) for reshard in RESHARD))
def fully_sharded_accumulates(order: str, reuse: str, reshard: bool) -> None:
    """The hook that sends a unit's gradients runs before nodes of the unit's earlier forwards."""
    for wrap in (blocks, layers):
        wrap = wrap(reshard_after_forward=reshard)
        check(wrap, order, step=accumulate, build=matrices, reuse=reuse)


@each(*((reuse, reshard) for reuse in REUSE for reshard in RESHARD))
def fully_sharded_accumulates_in_an_explicit_scope(reuse: str, reshard: bool) -> None:
    """Which holds several forwards and backwards together, and reads between them."""
    results = []
    for fuse in (True, False):
        model = blocks(reshard_after_forward=reshard)(matrices())
        scope = wnkernel.fuse(model, reuse=reuse).scope if fuse else nullcontext

        def step(model: nn.Module, x: Callable[[int], Tensor], k: int, scope: Any = scope) -> None:
            with scope():
                accumulate(model, lambda part: x(part).requires_grad_(), k, read=True)

        results.append(train(model, step, lambda *of: share(inputs(*of))))
    assert_close(*results)


@each(*((reuse, reshard) for reuse in REUSE for reshard in RESHARD))
def fully_sharded_runs_twice(reuse: str, reshard: bool) -> None:
    def in_turn(model: nn.Module, x: Callable[[int], Tensor], k: int) -> None:
        for y in [model(x(0)), model(x(1))]:
            loss(y).backward()

    def together(model: nn.Module, x: Callable[[int], Tensor], k: int) -> None:
        (loss(model(x(0))) + loss(model(x(1)))).backward()

    wrap = blocks(reshard_after_forward=reshard)
    for step in (in_turn, together):
        check(wrap, "fuse first", step=step, build=matrices, exact=False, reuse=reuse)


@each(*((reuse,) for reuse in REUSE))
def fully_sharded_with_checkpoints(reuse: str) -> None:
    def step(model: nn.Module, x: Callable[[int], Tensor], k: int) -> None:
        one_backward(model, lambda part: x(part).requires_grad_(), k)

    def checkpointed(reentrant: bool) -> Net:
        model = matrices()
        model.reentrant = reentrant
        return model

    for reentrant in (False, True):
        build = lambda reentrant=reentrant: checkpointed(reentrant)  # noqa: E731
        check(blocks(), "fuse first", step=step, build=build, reuse=reuse)


@each(*BOTH)
def fully_sharded_in_bfloat16(order: str, reuse: str) -> None:
    """What is gathered is in another dtype than what is sharded."""
    wrap = blocks(mp_policy=fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    model, twin = fused(matrices(), wrap, order, reuse=reuse)[0], wrap(matrices())
    got, want = (train(m, one_backward, lambda *of: share(inputs(*of))) for m in (model, twin))
    assert_same(got, want)


@each(*((reuse,) for reuse in REUSE))
def fully_sharded_parameters_change_in_place(reuse: str) -> None:
    """What forward sees is gathered anew, into the same objects and often at the same address."""
    model, plain = net(dim=1, width=256), net(dim=1, width=256)
    model = fused(model, blocks(), "fuse first", reuse=reuse)[0]
    x = inputs(0, width=256)
    for k in range(20):
        with torch.no_grad():
            assert torch.equal(model(x), plain(x)), f"stale after {k} changes"
            for p in (*model.parameters(), *plain.parameters()):
                p.mul_(0.9)


@each(*((order,) for order in ORDERS))
def weights_read_outside_a_forward(order: str) -> None:
    """v and g are DTensors then."""
    plain = matrices()
    model, group = fused(matrices(), blocks(), order)
    with Launched() as launched:
        for scope in (nullcontext, group.scope):
            with scope():
                for name in sorted(ALL):
                    w, want = (
                        m.get_submodule(name[: -len(".weight")]).weight for m in (model, plain)
                    )
                    torch.testing.assert_close(w.full_tensor(), want)
                    w.square().sum().backward()
                    want.square().sum().backward()
    assert not any(launched.names)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)


@each(("auto",), ("eager",))
def weights_in_a_list(backend: str) -> None:
    """Of DTensors, for which there is neither a kernel nor a rule of ours."""
    layers = [m for m in blocks()(matrices()).modules() if hasattr(m, "parametrizations")]
    weights = [m.parametrizations.weight for m in layers]
    v, g = [w.original1 for w in weights], [w.original0 for w in weights]
    dims = [w[0].dim for w in weights]
    with wnkernel.use_backend(backend):
        for w, *one in zip(functional.weight_norms(v, g, dims), v, g, dims, strict=True):
            assert torch.equal(w.full_tensor(), functional.weight_norm(*one).full_tensor())
            w.square().sum().backward()
            assert one[0].grad is not None
            assert one[1].grad is not None


def test_two_processes(tmp_path):
    assert_no_failures(__name__, "fully_sharded", tmp_path)


@needs("sharded weights")
def test_two_processes_that_read_sharded_weights(tmp_path):
    assert_no_failures(__name__, "weights", tmp_path)
