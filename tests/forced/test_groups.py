"""Forced weight norms in groups: one launch with the usual ones, and one write per forward."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import wnkernel
from wnkernel import WeightNormGroup, forced_weight_norm, weight_norm

from .. import groups
from ..compiled import step
from ..groups import (
    Block,
    assert_plain,
    assert_same,
    assert_same_tensors,
    both_modes,
    gradients,
    join,
    ramp,
    weights,
)
from ..processes import PATIENCE_S
from ..versions import layers_in_graphs
from .edm2 import forced, original

F64, BF16 = torch.float64, torch.bfloat16


class Net(nn.Module):
    """Forced weights of several shapes, dims and dtypes, usual ones, and a plain layer."""

    def __init__(self) -> None:
        super().__init__()
        force = forced_weight_norm
        self.front = Block(
            conv=(force(nn.Conv1d(4, 6, 3), gain=1.5), (2, 4, 8)),
            usual=(weight_norm(nn.Conv1d(4, 5, 3)), (2, 4, 8)),
            wide=(force(nn.Linear(150, 130), dim=None), (2, 150)),  # recycled memory
        )
        self.back = Block(
            image=(force(nn.Conv2d(4, 6, 3), eps=0.1), (2, 4, 5, 5)),
            fine=(force(nn.Linear(5, 3, dtype=F64), dim=1), (2, 5)),
            coarse=(force(nn.Linear(7, 6, dtype=BF16)), (2, 7)),
            whole=(weight_norm(nn.Linear(5, 4), dim=None), (2, 5)),
            plain=(nn.Linear(5, 4), (2, 5)),
        )
        self.head = force(nn.Linear(9, 4))
        self.between: Callable[[], object] = lambda: None

    def forward(self) -> Tensor:
        first = self.front()
        self.between()
        head = self.head(ramp(2, 9, dtype=self.head.bias.dtype))
        return join([first, self.back(), head])


FORCED, ALL = 6, 8


def twins(
    reuse: str = "forward", build: Callable[[], nn.Module] = Net, **options: Any
) -> tuple[nn.Module, nn.Module, WeightNormGroup]:
    """Those of other tests of groups, of :class:`Net` here."""
    return groups.twins(reuse, build, **options)


def versions(model: nn.Module) -> list[int]:
    return [v._version for v in forced(model)]


@contextmanager
def writes(model: nn.Module, times: int) -> Iterator[None]:
    """How often each forced v is written to within the block."""
    before = versions(model)
    yield
    assert [b - a for a, b in zip(before, versions(model), strict=True)] == [times] * len(before)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_steps(model: nn.Module, twin: nn.Module, count: int = 3) -> None:
    """Training steps have the same bits, of outputs, parameters and gradients."""
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in (model, twin)]
    for _ in range(count):
        outputs = model(), twin()
        assert_same(*outputs)
        assert_same_tensors(parameters(model), parameters(twin))
        for y, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            y.square().sum().backward()
            optimizer.step()
        assert_same_tensors(gradients(model), gradients(twin))


# One launch


@both_modes
def test_training_has_the_same_bits(backend: str, reuse: str, launched: list[int]) -> None:
    model, twin, group = twins(reuse)
    assert len(group.layers) == ALL
    assert_same_steps(model, twin)
    assert launched == [ALL] * 3


@both_modes
def test_one_node_and_one_write(backend: str, reuse: str) -> None:
    model, twin, group = twins(reuse)
    want = twin()
    with writes(model, 1), group.scope():
        found = weights(model)
        for _ in range(2):
            assert_same(model(), want)
    assert len(found) == ALL
    assert len({w.grad_fn for w in found.values()}) == 1
    assert len({w.grad_fn for w in weights(twin).values()}) == ALL


@both_modes
def test_evaluation_writes_nothing(backend: str, reuse: str) -> None:
    model, twin, _ = twins(reuse)
    model.eval(), twin.eval()
    before = parameters(model)
    with writes(model, 0):
        for _ in range(2):
            assert_same(model(), twin())
        with torch.no_grad():
            model()
    assert_same_tensors(parameters(model), before)


def test_each_forward_writes_once(backend: str) -> None:
    model, twin, _ = twins("forward")
    for _ in range(3):
        with writes(model, 1), writes(twin, 1):
            assert_same(model(), twin())
        assert_same_tensors(parameters(model), parameters(twin))


def test_in_version_mode_the_second_forward_of_a_step_writes_nothing(backend: str) -> None:
    """So gradients of two forwards may be taken together: a discriminator's real and fake."""
    model, twin, _ = twins("version")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        with writes(model, 1):
            first, second = model(), model()
        assert_same(first, second)
        optimizer.zero_grad()
        (first + second).square().sum().backward()
        with writes(model, 1):
            optimizer.step()
    y, z = twin(), twin()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (y + z).sum().backward()


def test_in_version_mode_refresh_writes_again(backend: str) -> None:
    model, _, group = twins("version")
    model()
    with writes(model, 0):
        model()
    group.refresh()
    with writes(model, 1):
        model()


def test_in_version_mode_a_changed_weight_is_written_alone(backend: str) -> None:
    model, twin, _ = twins("version")
    for m in (model, twin):
        m()
        with torch.no_grad():
            original(m.head).mul_(3)
    before = versions(model)
    model(), twin()
    changed = [b - a for a, b in zip(before, versions(model), strict=True)]
    assert sorted(changed) == [0] * (FORCED - 1) + [1]
    assert_same(original(model.head), original(twin.head))


def test_in_version_mode_training_after_evaluation_writes(backend: str) -> None:
    """A validation with gradients enabled, then the next step: v has to be forced there, on which
    its gradient depends."""
    model, _, _ = twins("version")
    model.eval()
    model()
    model.train()
    with writes(model, 1):
        model()


def test_training_and_evaluation_take_turns(backend: str) -> None:
    model, twin, _ = twins("forward")
    for training in (True, False, True, False, False, True):
        model.train(training), twin.train(training)
        with writes(model, training):
            assert_same(model(), twin())
        assert_same_tensors(parameters(model), parameters(twin))


def test_parts_in_evaluation(backend: str, launched: list[int]) -> None:
    """One launch for weights that are written to and weights that are not."""
    model, twin, _ = twins()
    for m in (model, twin):
        m.front.eval()
    with writes(model.front, 0), writes(model.back, 1):
        assert_same(model(), twin())
    assert launched == [ALL]
    assert_same_steps(model, twin, 2)


@both_modes
def test_scopes(backend: str, reuse: str, launched: list[int]) -> None:
    model, twin, group = twins(reuse)
    want = twin()
    with writes(model, 1), group.scope():
        w = model.head.weight
        for _ in range(2):
            assert_same(model(), want)
            assert model.head.weight is w
    assert launched == [ALL]
    again = 0 if reuse == "version" else 1
    with writes(model.front, again), writes(model.back, again):
        model.front(), model.back()  # each is a scope of its own


@both_modes
def test_a_layer_twice_in_a_forward(backend: str, reuse: str) -> None:
    """It is written to once, so its backward is right; unfused it raises."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = forced_weight_norm(nn.Linear(4, 4, dtype=F64))
            self.b = weight_norm(nn.Linear(4, 4, dtype=F64))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.b(self.a(x)).tanh())

    model, twin, _ = twins(reuse, Twice)
    x = torch.randn(3, 4, dtype=F64)
    with writes(model, 1):
        y = model(x)
    y.square().sum().backward()
    with parametrize.cached():
        want = twin(x)
    want.square().sum().backward()
    assert_same(y, want)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)


# Options and modes


@both_modes
def test_autocast(backend: str, reuse: str) -> None:
    """w has the bits of the cast, and v stays in float32."""

    def build() -> nn.Module:
        layers = forced_weight_norm(nn.Linear(6, 5)), weight_norm(nn.Linear(5, 4))
        return nn.Sequential(*layers, forced_weight_norm(nn.Linear(4, 3), gain=2.0))

    model, twin, group = twins(reuse, build, autocast=True)
    x = torch.randn(2, 6)
    with torch.autocast("cpu", BF16), writes(model, 1):
        with group.scope():
            assert {w.dtype for w in weights(model).values()} == {BF16}
            assert len({w.grad_fn for w in weights(model).values()}) == 1
            y = model(x)
        want = twin(x)
    assert_same(y, want)
    for m, out in ((model, y), (twin, want)):
        out.square().sum().backward()
        assert all(v.dtype == torch.float32 for v in forced(m))
    assert_same_tensors(parameters(model), parameters(twin))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.grad.dtype == torch.float32
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6)


@both_modes
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_without_gradients(
    backend: str, training: bool, mode: Callable[[], Any], reuse: str, launched: list[int]
) -> None:
    model, twin, _ = twins(reuse)
    model.train(training), twin.train(training)
    with writes(model, int(training)), mode():
        assert torch.equal(model(), twin())
    assert_same_tensors(parameters(model), parameters(twin))
    assert launched == [ALL]


KIB = 1 / 1024


@both_modes
@pytest.mark.parametrize(("cap", "launches"), [(1e-9, ALL), (70 * KIB, 3), (100.0, 1)])
def test_buckets(backend: str, cap: float, launches: int, reuse: str, launched: list[int]) -> None:
    """The wide layer has 76 KiB, and a bucket of its own."""
    model, twin, _ = twins(reuse, bucket_cap_mb=cap)
    with writes(model, 1):
        y = model()
    assert len(launched) == launches
    assert sum(launched) == ALL
    want = twin()
    assert_same(y, want)
    y.square().sum().backward(), want.square().sum().backward()
    assert_same_tensors(gradients(model), gradients(twin))


@both_modes
def test_frozen_layers(backend: str, reuse: str, launched: list[int]) -> None:
    """They are forced as others are, and get no gradient."""
    model, twin, _ = twins(reuse)
    for m in (model, twin):
        original(m.head).requires_grad_(False)
        m.front.requires_grad_(False)
    with writes(model, 1):
        y = model()
    want = twin()
    assert_same(y, want)
    y.square().sum().backward(), want.square().sum().backward()
    assert_same_tensors(gradients(model), gradients(twin))
    assert original(model.head).grad is None
    assert launched == [ALL]


def test_all_frozen(backend: str) -> None:
    model, twin, _ = twins()
    model.requires_grad_(False), twin.requires_grad_(False)
    with writes(model, 1):
        assert_same(model(), twin())


@both_modes
def test_removal(backend: str, reuse: str, launched: list[int]) -> None:
    model, twin, group = twins(reuse)
    assert_same(model(), twin())
    group.remove()
    assert_plain(model)
    launched.clear()
    with writes(model, 1):
        assert_same(model(), twin())
    assert launched == []
    assert len(wnkernel.fuse(model).layers) == ALL


def test_removal_within_a_forward(backend: str) -> None:
    """What was computed for the rest of the forward is dropped, and written to again."""
    model, twin, group = twins()
    model.between = group.remove
    y, want = model(), twin()
    assert_same(y[: model.front().numel()], want[: twin.front().numel()])
    torch.testing.assert_close(y[-8:], want[-8:], rtol=1e-5, atol=1e-5)  # the head


@both_modes
def test_copies(backend: str, reuse: str, launched: list[int]) -> None:
    model, twin, group = twins(reuse)
    model(), twin()
    copied = copy.deepcopy(model)
    assert WeightNormGroup.of(copied)._roster is not group._roster
    before = parameters(model)
    launched.clear()
    with writes(model, 0), writes(copied, 1):
        y = copied()
    assert launched == [ALL]
    assert_same_tensors(parameters(model), before)
    assert_same(y, twin())
    group.remove()
    for m in (copied, twin):
        for v in m.parameters():
            v.data.mul_(2)
    WeightNormGroup.of(copied).refresh()
    assert_same_steps(copied, twin)


def test_layers_beside_a_group_that_is_theirs_alone(backend: str) -> None:
    """A forced layer is enough for fuse, and two groups refuse each other."""
    layer = forced_weight_norm(nn.Linear(4, 3))
    group = wnkernel.fuse(layer)
    assert group.layers == ["weight"]
    with pytest.raises(RuntimeError, match=r"expected layers outside any group, got '0\.weight'"):
        wnkernel.fuse(nn.Sequential(layer))


def test_loading_into_a_group(backend: str) -> None:
    for reuse in ("forward", "version"):
        model, twin, _ = twins(reuse)
        other = Net()
        model()
        for m in (model, twin):
            m.load_state_dict(copy.deepcopy(other.state_dict()))
        assert_same(model(), twin())
        assert set(model.state_dict()) == set(twin.state_dict())


def test_a_removed_forced_norm_leaves_the_others(backend: str) -> None:
    model, twin = Net(), Net()
    twin.load_state_dict(model.state_dict())
    group = wnkernel.fuse(model)
    for m in (model, twin):
        m.eval()
        parametrize.remove_parametrizations(m.head, "weight")
        m.train()
    assert len(group.layers) == ALL - 1
    assert_same_steps(model, twin, 2)


# Threads


def on(backend: str, model: nn.Module, found: list[Tensor]) -> None:
    with wnkernel.use_backend(backend):
        found.append(model())


@both_modes
def test_threads_have_launches_of_their_own(backend: str, reuse: str, launched: list[int]) -> None:
    """One after the other, as each writes to v."""
    model, twin, _ = twins(reuse)
    found: list[Tensor] = []
    with writes(model, 2):
        model()
        thread = threading.Thread(target=on, args=(backend, model, found))
        thread.start()
        thread.join(PATIENCE_S)
    twin()
    assert_same(found[0], twin())
    assert launched == [ALL, ALL]


def test_evaluations_of_several_threads_at_once(backend: str) -> None:
    model, twin, _ = twins()
    model.eval(), twin.eval()
    want, found = twin(), []
    barrier = threading.Barrier(3)
    model.between = lambda: barrier.wait(PATIENCE_S)
    many = [threading.Thread(target=on, args=(backend, model, found)) for _ in range(3)]
    for thread in many:
        thread.start()
    for thread in many:
        thread.join(PATIENCE_S)
    assert len(found) == 3
    for y in found:
        assert_same(y, want)


# torch.compile


@layers_in_graphs
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled(launched: list[int]) -> None:
    """A graph computes each weight by itself, and forces it once per call."""

    def build() -> nn.Module:
        layer = forced_weight_norm(nn.Linear(4, 4, dtype=F64))
        return nn.Sequential(layer, weight_norm(nn.Linear(4, 2, dtype=F64)))

    model, twin, _ = twins("version", build)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 4, dtype=F64)
    for training in (True, True, False):
        model.train(training), twin.train(training)
        got, want = step(run, model, x), step(twin, twin, x)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(forced(model), forced(twin), rtol=1e-10, atol=1e-12)
    assert launched == []
