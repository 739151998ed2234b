"""A slot notices what changed; the compiled one and its twin in Python say the same."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functionalize, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from wnkernel import native
from wnkernel.grouping import slots as of_groups
from wnkernel.grouping.slots import ALONE, _python_launch_mode, _python_slots

from ..torch_modes import Dispatches, Functions, deterministic

needs_native = pytest.mark.skipif(not native.loaded(), reason=native.load_error() or "loaded")

Slots = Callable[[list[Tensor], list[Tensor], list[Tensor]], list]


@pytest.fixture(params=["native", "python"])
def slots(request: pytest.FixtureRequest) -> Slots:
    if request.param == "python":
        return _python_slots
    if native.slots is None:
        pytest.skip(native.load_error())
    return native.slots


def weight() -> tuple[Tensor, Tensor, Tensor]:
    """w, v and g; no function of each other, as a slot does not care."""
    w = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    v = nn.Parameter(torch.randn(2, 3, 4, dtype=torch.bfloat16))
    return w, v, nn.Parameter(torch.randn(2, 1, 1, dtype=torch.bfloat16))


def swap(t: Tensor, other: Tensor) -> None:
    t.data = other


def inference_write(t: Tensor) -> None:
    with torch.inference_mode():
        t.add_(1)


def shifted(t: Tensor) -> None:
    """The same sizes and strides, further back in the same storage."""
    swap(t, torch.cat([t.detach(), t.detach()]))
    t.data = t.data[: len(t) // 2]
    t.data = t.data.as_strided(t.shape, t.stride(), t.numel())


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "in place": lambda t: t.add_(1),
    "in inference mode": inference_write,
    "in place, without an effect": lambda t: t.add_(0),
    "through a view": lambda t: t[0].zero_(),
    "through detach": lambda t: t.detach().zero_(),
    "other storage": lambda t: swap(t, t.detach().clone()),
    "other strides": lambda t: swap(t, t.data.as_strided((2, 3, 4), (12, 1, 3))),
    "other sizes": lambda t: swap(t, t.data[:1]),
    "other offset": shifted,
    "other dtype": lambda t: swap(t, t.data.view(torch.float16)),
    "requires_grad": lambda t: t.requires_grad_(not t.requires_grad),
}

each_change = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


def test_a_slot_gives_w_as_long_as_nothing_changed(slots: Slots) -> None:
    w, v, g = weight()
    [slot] = slots([w], [v], [g])
    assert slot.is_current(v, g)
    assert not slot.taken
    for _ in range(2):
        assert slot.take(v, g) is w
        assert slot.taken


def test_a_slot_for_each_weight(slots: Slots) -> None:
    ws, vs, gs = (list(column) for column in zip(*(weight() for _ in range(3)), strict=True))
    several = slots(ws, vs, gs)
    for slot, w, v, g in zip(several, ws, vs, gs, strict=True):
        assert slot.take(v, g) is w
    assert slots([], [], []) == []


@pytest.mark.parametrize("whose", ["v", "g"])
@each_change
def test_a_change_of_a_parameter_is_noticed(
    slots: Slots, change: Callable[[Tensor], Any], whose: str
) -> None:
    w, v, g = weight()
    if whose == "g":
        g = nn.Parameter(torch.randn(2, 3, 4, dtype=torch.bfloat16))  # room for other strides
    [slot] = slots([w], [v], [g])
    with torch.no_grad():
        change(v if whose == "v" else g)
    assert not slot.is_current(v, g)
    assert slot.take(v, g) is None
    assert not slot.taken


@each_change
def test_a_change_of_w_is_noticed(slots: Slots, change: Callable[[Tensor], Any]) -> None:
    w, v, g = weight()
    [slot] = slots([w], [v], [g])
    with torch.no_grad():
        change(w)
    assert slot.take(v, g) is None


def test_other_objects_with_the_same_memory_are_other_parameters(slots: Slots) -> None:
    w, v, g = weight()
    [slot] = slots([w], [v], [g])
    for other_v, other_g in ((v.detach(), g), (v, g.detach()), (g, v), (nn.Parameter(v), g)):
        assert slot.take(other_v, other_g) is None
    assert slot.take(v, g) is w


def test_another_place_in_the_same_storage_is_noticed(slots: Slots) -> None:
    w, v, g = weight()
    two = torch.randn(2, 2, 3, 4, dtype=torch.bfloat16)
    v.data = two[0]
    [slot] = slots([w], [v], [g])
    assert slot.take(v, g) is w
    v.data = two[1]
    assert v.untyped_storage().data_ptr() == two.data_ptr()
    assert slot.take(v, g) is None


def test_lists_of_different_lengths_are_refused(slots: Slots) -> None:
    w, v, g = weight()
    for ws, vs, gs in (([w], [v], []), ([w], [], [g]), ([], [v], [g])):
        with pytest.raises(ValueError, match=r"length|shorter|longer"):
            slots(ws, vs, gs)


@needs_native
def test_the_compiled_twins_are_taken_where_they_are() -> None:
    assert of_groups.slots is native.slots
    assert of_groups.launch_mode is native.launch_mode


def test_a_change_of_data_that_is_taken_back_is_none(slots: Slots) -> None:
    w, v, g = weight()
    [slot] = slots([w], [v], [g])
    before = v.data
    v.data = torch.zeros(3)
    assert slot.take(v, g) is None
    v.data = before
    assert slot.take(v, g) is w


def test_another_storage_at_the_same_address_is_noticed(slots: Slots) -> None:
    """As when an allocator hands out again what was free; the slot keeps its storage from it."""
    memory = bytearray(2 * 24)

    def at_the_same_address() -> Tensor:
        return torch.frombuffer(memory, dtype=torch.bfloat16).view(2, 3, 4)

    w, v, g = weight()
    v.data = at_the_same_address()
    before = v.data_ptr()
    [slot] = slots([w], [v], [g])
    for _ in range(20):
        v.data = at_the_same_address()
        assert v.data_ptr() == before
        assert slot.take(v, g) is None


def test_nbytes_is_the_memory_of_w(slots: Slots) -> None:
    w, v, g = weight()
    [slot] = slots([w[:1]], [v], [g])
    assert slot.nbytes == w.untyped_storage().nbytes() == 2 * 24


def test_inference_tensors_have_no_version(slots: Slots) -> None:
    with torch.inference_mode():
        w = torch.randn(2, 3)
        v, g = torch.randn(2, 3), torch.randn(2, 1)
    [slot] = slots([w], [v], [g])
    assert slot.take(v, g) is w


def test_a_slot_keeps_its_tensors_alive_and_lets_go_of_them(slots: Slots) -> None:
    arrays = [np.ones((2, 3)) for _ in range(3)]
    free = [sys.getrefcount(array) for array in arrays]
    w, v, g = (torch.from_numpy(array) for array in arrays)
    several = slots([w], [v], [g])
    several[0].take(v, g)
    del w, v, g
    assert all(sys.getrefcount(a) > n for a, n in zip(arrays, free, strict=True))
    del several
    assert [sys.getrefcount(array) for array in arrays] == free


@needs_native
def test_wrong_arguments_are_refused() -> None:
    w, v, g = weight()
    with pytest.raises(TypeError, match="expected three lists"):
        native.slots((w,), (v,), (g,))
    with pytest.raises(ValueError, match="same length"):
        native.slots([w], [v], [])
    with pytest.raises(TypeError, match=r"v: expected a torch\.Tensor, got int"):
        native.slots([w], [1], [g])
    [slot] = native.slots([w], [v], [g])
    with pytest.raises(TypeError, match="expected v and g, got 1"):
        slot.take(v)
    with pytest.raises(TypeError, match=r"g: expected a torch\.Tensor, got NoneType"):
        slot.take(v, None)
    with pytest.raises(TypeError, match="cannot create"):
        type(slot)()


# launch_mode


TOGETHER: dict[str, Callable[[], AbstractContextManager]] = {
    "nothing": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "deterministic": deterministic,
    "device": lambda: torch.device("meta"),
}

SINGLY: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "vmap": lambda f: vmap(f)(torch.ones(2, 3)),
    "grad": lambda f: grad(lambda x: f(x).sum())(torch.ones(3)),
    "jvp": lambda f: jvp(f, (torch.ones(3),), (torch.ones(3),)),
    "functionalize": lambda f: functionalize(f)(torch.ones(3)),
    "make_fx": lambda f: make_fx(f)(torch.ones(3)),
    "jit.trace": lambda f: torch.jit.trace(f, torch.ones(3), check_trace=False),
    "function mode": lambda f: within(Functions(), f),
    "function mode within a device": lambda f: within(torch.device("cpu"), within, Functions(), f),
    "device within a function mode": lambda f: within(Functions(), within, torch.device("cpu"), f),
}


def within(mode: AbstractContextManager, f: Callable[..., Any], *args: Any) -> None:
    with mode:
        f(*args or (torch.ones(3),))


@needs_native
def test_the_twins_agree_on_the_launch_mode() -> None:
    seen = {}
    for name, outer in TOGETHER.items():
        for other, inner in TOGETHER.items():
            with outer(), inner():
                assert _python_launch_mode() == native.launch_mode()
                seen[name, other] = _python_launch_mode()
    alone = {name: seen[name, "nothing"] for name in TOGETHER if name != "device"}
    assert len({*alone.values()}) == len(alone)
    assert ALONE not in seen.values()
    with deterministic(warn_only=True):
        assert _python_launch_mode() == native.launch_mode() == alone["deterministic"]


@pytest.mark.parametrize("is_native", [pytest.param(True, marks=needs_native), False])
@pytest.mark.parametrize("transform", SINGLY.values(), ids=SINGLY)
def test_under_transforms_and_tracers_weights_are_alone(
    transform: Callable[[Callable[[Tensor], Tensor]], Any], is_native: bool
) -> None:
    launch_mode = native.launch_mode if is_native else _python_launch_mode
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(launch_mode())
        return x * 2

    before = launch_mode()
    transform(function)
    assert seen
    assert {*seen} == {ALONE}
    assert launch_mode() == before != ALONE
    with Dispatches():
        assert launch_mode() == ALONE
