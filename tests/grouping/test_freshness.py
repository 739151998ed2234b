"""A fused model equals an unfused twin after every way of changing a parameter; with
``reuse="version"``, after exactly those that leave a trace."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.profiler import ProfilerActivity, profile

from wnkernel import WeightNormGroup

from ..changes import ALL, SEEN, SWAPS, UNSEEN, Change, each_of, in_place, moved
from ..groups import (
    LAYERS,
    REUSE,
    Computed,
    Net,
    assert_same,
    assert_same_models,
    assert_same_tensors,
    both_modes,
    gradients,
    layer,
    originals,
    ramp,
    twins,
    weights,
)
from ..processes import ROOT

Reader = Callable[[nn.Module, WeightNormGroup | None], dict[str, Tensor]]


def in_no_grad(model: nn.Module, group: WeightNormGroup | None) -> dict[str, Tensor]:
    with torch.no_grad():
        return {"output": model()}


def in_parts(model: nn.Module, group: WeightNormGroup | None) -> dict[str, Tensor]:
    head = model.head(ramp(2, 9, dtype=model.head.bias.dtype))
    return {"front": model.front(), "back": model.back(), "head": head}


def in_scope(model: nn.Module, group: WeightNormGroup | None) -> dict[str, Tensor]:
    with group.scope() if group else nullcontext():
        return weights(model) | {f"{name} again": w for name, w in weights(model).items()}


READERS: dict[str, Reader] = {
    "forward": lambda model, group: {"output": model()},
    "forward under no_grad": in_no_grad,
    "submodules": in_parts,
    "scope": in_scope,
    "outside": lambda model, group: weights(model),
}

all_readers = pytest.mark.parametrize("read", READERS.values(), ids=READERS)


def values(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors.values()]


def differ(a: list[Tensor], b: list[Tensor]) -> bool:
    return any(x.dtype != y.dtype or not torch.equal(x, y) for x, y in zip(a, b, strict=True))


def assert_seen(reuse: str, change: Change, read: Reader) -> None:
    """Twice: what a change leaves behind must not hide the next one."""
    model, twin, group = twins(reuse)
    for _ in range(2):
        assert_same_tensors(read(model, group), read(twin, None))
        change(model)
        change(twin)
        assert_same_tensors(read(model, group), read(twin, None))


@all_readers
@each_of(ALL)
def test_by_default_every_change_is_seen(backend: str, change: Change, read: Reader) -> None:
    assert_seen("forward", change, read)


@all_readers
@each_of(SEEN)
def test_in_version_mode_every_trace_is_seen(backend: str, change: Change, read: Reader) -> None:
    assert_seen("version", change, read)


@each_of(SEEN)
def test_slots_without_the_compiled_module_see_the_same(python_slots: None, change: Change) -> None:
    for reuse in REUSE:
        assert_seen(reuse, change, READERS["forward"])


@each_of(UNSEEN)
@pytest.mark.parametrize("grad", [True, False])
def test_in_version_mode_what_leaves_no_trace_waits_for_refresh(
    backend: str, grad: bool, change: Change
) -> None:
    model, twin, group = twins("version")
    with torch.set_grad_enabled(grad):
        before = values({"output": model()})
        change(model)
        change(twin)
        assert not differ(values({"output": model()}), before)
        group.refresh()
        assert_same(model(), twin())


@pytest.mark.parametrize("what", UNSEEN)
def test_the_documentation_lists_what_leaves_no_trace(what: str) -> None:
    text = (ROOT / "docs" / "fuse.md").read_text()
    _, _, section = text.partition("cannot see")
    assert what.split()[0] in section.split("\n## ")[0]


@each_of(SWAPS)
def test_in_version_mode_a_swap_is_seen_or_refused(backend: str, change: Change) -> None:
    """torch swaps only tensors that nobody else holds, and says so."""
    model, twin, group = twins("version")
    assert_same(model(), twin())
    try:
        change(model)
    except RuntimeError as error:
        if not re.search("swap|use_count", str(error)):
            raise
        assert_same_models(model, twin)
        group.refresh()
        change(model)
    change(twin)
    assert_same_models(model, twin)


@each_of(ALL)
def test_every_change_of_the_table_changes_something(change: Change) -> None:
    """The control: a stale weight would not go unnoticed."""
    _, twin, _ = twins()
    state = {key: p for key, p in twin.named_parameters() if ".original" in key}
    before = values(weights(twin)), [p.requires_grad for p in state.values()]
    change(twin)
    state = {key: p for key, p in twin.named_parameters() if ".original" in key}
    after = values(weights(twin)), [p.requires_grad for p in state.values()]
    assert differ(before[0], after[0]) or before[1] != after[1]


@pytest.mark.parametrize("seed", range(4))
@both_modes
def test_any_sequence_of_changes_and_reads(backend: str, reuse: str, seed: int) -> None:
    """Also changes of some layers only, layers left out of a forward, and dtypes on the way."""
    table = ALL if reuse == "forward" else SEEN
    # Some tensors are held; half overflows in the end; torch flattens contiguous parameters only.
    refused = {*SWAPS, "to half and back", "vector_to_parameters"}
    dice = random.Random(seed)
    model, twin, group = twins(reuse)
    for _ in range(40):
        change = table[dice.choice([name for name in table if name not in refused])]
        skip = dice.sample([name.split(".")[-1] for name in LAYERS], dice.randrange(3))
        read = READERS[dice.choice([*READERS])]
        seed = dice.randrange(1000)
        for module in (model, twin):
            change(module)
            random_part(module, seed)
        assert_same_tensors(read(model, group), read(twin, None))
        assert_same(model(skip), twin(skip))


def random_part(model: nn.Module, seed: int) -> None:
    """Changes of some layers that leave a trace, and requires_grad of some."""
    dice = random.Random(seed)
    for p in dice.sample(originals(model), 3):
        in_place(p)
    for p in dice.sample(originals(model), 3):
        p.requires_grad_(dice.random() < 0.7)


@both_modes
def test_layers_skipped_in_one_forward_and_used_in_the_next(backend: str, reuse: str) -> None:
    model, twin, _ = twins(reuse)
    change = SEEN["in place under no_grad"] if reuse == "version" else UNSEEN[".data"]
    for skip in ({"conv", "head"}, (), {"wide", "image"}, {"head"}, (), ()):
        assert_same(model(skip), twin(skip))
        change(model)
        change(twin)


@both_modes
def test_functional_call_with_other_parameters(backend: str, reuse: str) -> None:
    model, twin, _ = twins(reuse)
    assert_same_models(model, twin)
    for some in (".original0", ".original1", "front", ""):
        other = {
            key: moved(p).requires_grad_() for key, p in model.named_parameters() if some in key
        }
        for _ in range(2):
            assert_same(functional_call(model, other, ()), functional_call(twin, other, ()))
            for p in other.values():
                in_place(p)
        assert_same_models(model, twin)


@both_modes
def test_toggled_requires_grad_reaches_the_gradients(backend: str, reuse: str) -> None:
    model, twin, _ = twins(reuse)
    count = len(originals(model))
    for frozen in (set(), {0, 3}, {1, 2, 4, 5}, set(range(count)), set()):
        for module in (model, twin):
            for k, p in enumerate(originals(module)):
                p.requires_grad_(k not in frozen)
            module.zero_grad()
            module().square().mean().backward()
        assert_same_tensors(gradients(model), gradients(twin))


@both_modes
def test_training_has_the_bits_of_the_twin(backend: str, reuse: str) -> None:
    model, twin, _ = twins(reuse)
    for name in ("SGD foreach", "Adam fused", "optimizer through .data", "Adagrad fused"):
        for module in (model, twin):
            SEEN[name](module)
        assert_same_tensors(gradients(model), gradients(twin))
        assert_same_models(model, twin)


class Midway(nn.Module):
    """Something happens between two uses of the same layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.between: Callable[[], object] = lambda: None

    def forward(self) -> Tensor:
        first = self.net()
        self.between()
        return torch.stack([first, self.net()])


@each_of(SEEN)
@both_modes
def test_a_trace_is_seen_within_a_forward_too(reuse: str, change: Change) -> None:
    model, twin, _ = twins(reuse, Midway)
    for module in (model, twin):
        module.between = partial(change, module.net)
    for _ in range(2):
        assert_same(model(), twin())


def test_in_version_mode_nothing_is_computed_when_nothing_changed(
    backend: str, computed: Computed
) -> None:
    model, twin, _ = twins("version")
    want = twin()
    want.square().mean().backward()
    computed.take()
    for forward in range(3):
        y = model()
        assert computed.take() == ([7] if forward == 0 else [], 0)
        assert_same(y, want)
        model.zero_grad()  # gradients have no part in it
        y.square().mean().backward()
        assert_same_tensors(gradients(model), gradients(twin))
        model.front(), model.train(forward % 2 == 0)
        assert computed.take() == ([], 0)


def test_in_version_mode_a_frozen_model_launches_no_kernel(compiled_backend: str) -> None:
    model, twin, _ = twins("version")
    for module in (model, twin):
        module.requires_grad_(False)

    def kernels(module: nn.Module) -> int:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            module()
        return sum(event.name.startswith("wnkernel::") for event in profiler.events())

    assert [kernels(model) for _ in range(3)] == [1, 0, 0]
    assert kernels(twin) == 7


def test_in_version_mode_only_what_changed_is_computed_again(
    backend: str, computed: Computed
) -> None:
    model, twin, group = twins("version")
    model()
    for names in (["head"], ["front.conv", "back.coarse"], LAYERS):
        for module in (model, twin):
            for name in names:
                in_place(layer(module, name).parametrizations.weight.original0)
        computed.take()
        y = model()
        assert computed.take() == ([len(names)], 0)
        assert_same(y, twin())
    for again in (group.refresh, step_of_another_model):
        again()
        computed.take()
        model()
        assert computed.take() == ([7], 0)


def step_of_another_model() -> None:
    """What an optimizer writes to is its own secret: its step counts for every group."""
    p = nn.Parameter(torch.ones(1))
    p.grad = torch.ones(1)
    torch.optim.SGD([p], lr=0.1, fused=True).step()


def test_by_default_every_forward_computes_once(backend: str, computed: Computed) -> None:
    model, _, _ = twins("forward")
    for _ in range(3):
        model()
        assert computed.take() == ([7], 0)
