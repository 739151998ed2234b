"""What a step on the Triton backend makes and keeps: tables, memory, nobody's tensors."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import wnkernel
from wnkernel import functional as F
from wnkernel.backends.triton.tables import BACKWARD, FORWARD
from wnkernel.forms import Problems
from wnkernel.problem import Problem, check

from ..cases import randn, randn_g
from .cases import (
    DEVICE,
    TRITON,
    Case,
    assert_right,
    assert_same_bits,
    case,
    fresh,
    needs_triton,
    record_launches,
    run,
)

pytestmark = needs_triton

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh(monkeypatch)


def mixed() -> list[Case]:
    return [
        case((6, 4, 3), 0),
        case((5, 7), 1, BF16, g_dtype=F32),
        case((3, 4, 5), None, F64, eps=0.5),
        case((0, 3), 1),
        case((2, 33), 0),
        case((5, 7), 0, out_dtype=BF16),
    ]


def problems_of(cases: Sequence[Case]) -> list[Problem]:
    return [check(c.v, c.g, c.dim, c.eps, c.out_dtype) for c in cases]


class Still:
    """Results lie where those of the same step before lay."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from wnkernel.backends.triton import launch, tables

        self.made, self.copied = 0, 0
        self._memory: list[Tensor] = []
        self._next = 0
        at, copy = tables.Table.at, tables.Uploads.copy

        def counted_at(*args: object) -> Tensor:
            self.made += 1
            return at(*args)

        def counted_copy(*args: object) -> Tensor:
            self.copied += 1
            return copy(*args)

        monkeypatch.setattr(tables.Table, "at", counted_at)
        monkeypatch.setattr(tables.Uploads, "copy", counted_copy)
        monkeypatch.setattr(launch, "allocator", lambda device: self._allocate)

    def _allocate(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        if self._next == len(self._memory):
            made = torch.empty_strided(size, stride, dtype=dtype, device=DEVICE)
            self._memory.append(made)
        self._next += 1
        return self._memory[self._next - 1].as_strided(size, stride).detach()

    def tables(self, cases: Sequence[Case]) -> int:
        """Run a step, check it, and say how many tables that took."""
        before, self._next = self.made, 0
        for memory in self._memory:
            memory.view(torch.uint8).fill_(1)
        for c, result in zip(cases, run(cases), strict=True):
            assert_right(c, result)
        return self.made - before


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> Still:
    return Still(monkeypatch)


def test_a_step_like_the_one_before_makes_no_table(still):
    cases = [case((6, 4), 0), case((4, 9), 0)]
    assert still.tables(cases) == 2  # a forward and a backward
    assert still.tables(cases) == 0
    cases[0].v.mul_(2)
    cases[1].g.add_(1)
    assert still.tables(cases) == 0


@pytest.mark.parametrize(("array", "tables"), [("v", 2), ("g", 2), ("grad_w", 1)])
def test_an_input_elsewhere_takes_other_tables(still, array, tables):
    cases = [case((6, 4), 0), case((4, 9), 0)]
    still.tables(cases)
    moved = [cases[0], cases[1]._replace(**{array: getattr(cases[1], array).clone()})]
    assert still.tables(moved) == tables
    assert still.tables(moved) == 0
    assert still.tables(cases) == 0


def test_other_tables_of_a_list_are_its_lines_only(still):
    """What program works on which weight does not depend on addresses, and is most of a table."""
    cases = [case((6, 4), 0), case((4, 9), 0)]
    still.tables(cases)
    assert still.copied == 4
    still.tables([c._replace(v=c.v.clone()) for c in cases])
    assert still.copied == 6


def test_every_launch_outside_of_captures_sees_to_the_reserve(monkeypatch, still):
    """Also one that finds its table: a capture may come next."""
    from wnkernel.backends.triton import launch

    seen: list[torch.device] = []
    monkeypatch.setattr(launch.Uploads, "refill", lambda self, device: seen.append(device))
    cases = [case((6, 4), 0), case((4, 9), 0)]
    for _ in range(2):
        still.tables(cases)
        assert seen == [DEVICE] * 2
        seen.clear()
    monkeypatch.setattr(launch, "is_capturing", lambda device: True)
    assert still.tables(cases) == 2
    assert seen == []


def test_another_order_shape_or_need_is_seen_at_the_same_addresses(still):
    """Whatever hides behind addresses that came before."""
    v, g, grad_w = randn((6, 6)).to(DEVICE), randn_g((6, 6), 0).to(DEVICE), randn((6, 6)).to(DEVICE)
    other = case((4, 9), 0)
    as_it_was = [Case(v, g, grad_w), other]
    still.tables(as_it_was)
    for changed in (
        Case(v.t(), g, grad_w.t()),
        Case(v, g.view(1, 6), grad_w, 1),
        Case(v[:3], g[:3], grad_w[:3]),
        Case(v, g, grad_w, 0, 9.0),
    ):
        still.tables([changed, other])
        still.tables(as_it_was)


@contextmanager
def without_gc() -> Iterator[None]:
    """What goes now goes because nobody refers to it."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("count", [1, 3])
def test_nothing_of_a_step_is_kept(count):
    with without_gc(), wnkernel.use_backend("triton"):
        cases = [case((6, 4), 0) for _ in range(count)]
        vs, gs = ([getattr(c, name).requires_grad_() for c in cases] for name in ("v", "g"))
        ws = F.weight_norms(vs, gs, [0] * count)
        grads = torch.autograd.grad(ws, [*vs, *gs], [c.grad_w for c in cases])
        seen = [weakref.ref(t) for t in (*vs, *gs, *ws, *grads, *(c.grad_w for c in cases))]
        del cases, vs, gs, ws, grads
        assert not [t for ref in seen if (t := ref()) is not None]


@pytest.mark.parametrize("count", [1, 3])
def test_results_have_memory_of_their_own(count):
    """A gradient that somebody keeps keeps no other; a write to one changes no other's version."""
    cases = [case((5, 7), k % 2) for k in range(count)]
    results = run(cases)
    found = [t for r in results for t in (r.w, r.grad_v, r.grad_g)]
    assert len({t.untyped_storage().data_ptr() for t in found}) == 3 * count
    for t in found:
        assert t.untyped_storage().nbytes() == t.numel() * t.element_size()
        assert t.data_ptr() % 64 == 0
        t.zero_()
    assert {t._version for t in found} == {found[0]._version}


def test_norms_of_a_list_lie_together_or_apart():
    cases = mixed()
    problems = problems_of(cases)
    (_, together), (_, apart) = (TRITON.weights(problems, apart=apart) for apart in (False, True))
    assert len(together) == len(list(together)) == len(apart) == len(cases)
    assert len({n.untyped_storage().data_ptr() for n in together}) == 1
    for a, b in zip(together, apart, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
        assert b.untyped_storage().nbytes() == b.numel() * b.element_size()
    yes, grads = [True] * len(cases), [c.grad_w for c in cases]
    found = [TRITON.gradients(problems, norms, grads, yes, yes) for norms in (together, apart)]
    for columns in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(*columns, strict=True))


def test_only_some_gradients_are_needed():
    cases = mixed()
    need_v = [True, False, False, True, True, False]
    need_g = [False, False, True, True, True, True]
    got, want = run(cases, need_v, need_g), run(cases)
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert (a.grad_v is None, a.grad_g is None) == (not need_v[k], not need_g[k])
        missing = [name for name in ("grad_v", "grad_g") if getattr(a, name) is None]
        assert_same_bits(a._replace(**{name: getattr(b, name) for name in missing}), b)


def test_nothing_is_launched_for_what_nobody_needs(monkeypatch):
    launches = record_launches(monkeypatch)
    cases = [case((6, 4), 0), case((4, 9), 0)]
    results = run(cases, [False, False], [False, False])
    assert all(r.grad_v is r.grad_g is None for r in results)
    assert [launch.kernel for launch in launches] == ["forward_list"]
    launches.clear()
    (_, needed) = run(cases, [False, True], [False, False])
    assert [launch.kernel for launch in launches] == ["forward_list", "backward_one"]
    assert_same_bits(needed._replace(grad_g=(want := run(cases)[1]).grad_g), want)


@pytest.mark.parametrize("shifted", ["none", "v", "w", "g"])
def test_accesses_are_as_wide_as_addresses_allow(shifted):
    """Those of all arrays that are laid out like v; g and the norms are read one by one."""
    from wnkernel.backends.triton.launch import Prepared

    cases = [case((6, 4), 0), case((4, 8), 0)]
    (group,) = Prepared(Problems.of(problems_of(cases))).groups
    addresses = {name: [64, 128] for name in ("v", "g", "w")}
    if shifted != "none":
        addresses[shifted][1] += 4
    batch = group.batch(FORWARD, addresses["v"], addresses["w"])
    vectors = [w.vector for w in batch.weights]
    assert vectors == [4, 1 if shifted in ("v", "w") else 4]
    assert group.batch(FORWARD, addresses["v"], addresses["w"]) is batch
    assert group.batch(BACKWARD, addresses["v"], addresses["w"]) is not batch


def test_few_patterns_of_odd_addresses_are_remembered():
    """Gradients in flat buffers may have another in every step."""
    from wnkernel.backends.triton.launch import BATCHES, Prepared

    cases = [case((6, 4), 0) for _ in range(6)]
    (group,) = Prepared(Problems.of(problems_of(cases))).groups
    for pattern in range(1 << len(cases)):
        odd = [64 + 4 * (pattern >> k & 1) for k in range(len(cases))]
        batch = group.batch(FORWARD, odd, odd)
        assert [w.vector for w in batch.weights] == [1 if a % 16 else 4 for a in odd]
        assert len(group._batches) <= BATCHES


def test_operators_keep_no_tables(still):
    """A compiler may run them in memory that it manages, and counts what is left there."""
    cases = [case((6, 4), 0), case((4, 9), 0)]
    still.tables(cases)
    kept = TRITON._launcher._tables._kept
    before, problems = len(kept), problems_of(cases)
    made = still.made
    for _ in range(2):
        _, norms = TRITON.weights(problems, apart=True)
        yes = [True] * 2
        TRITON.gradients(problems, norms, [c.grad_w for c in cases], yes, yes, apart=True)
    assert (len(kept), still.made) == (before, made + 4)
