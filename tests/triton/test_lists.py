"""Lists on the Triton backend: the bits of single weights, how many launches, which tables."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from torch import Tensor, nn

import wnkernel
from wnkernel.backends.triton import tables
from wnkernel.backends.triton.plan import Kind
from wnkernel.backends.triton.tables import FORWARD, Weight
from wnkernel.problem import check

from .. import reference
from ..cases import DTYPES, randn, randn_g
from .cases import (
    DEVICE,
    TRITON,
    Case,
    Result,
    assert_right,
    assert_right_forward,
    assert_same_bits,
    case,
    fresh,
    needs_triton,
    plan_of,
    record_launches,
    rows_case,
    run,
    split_early,
)

pytestmark = needs_triton

F16, BF16, F32, F64 = DTYPES


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    fresh(monkeypatch)


def mixed() -> list[Case]:
    """Weights of every kind, dtype and dim, some of whose rows are split (with split_early)."""
    inside = Case(
        randn((6, 5, 8), layout="cut").to(DEVICE),
        randn_g((6, 5, 8), 1).to(DEVICE),
        randn((6, 5, 8), layout="transposed").to(DEVICE),
        1,
    )
    return [
        case((6, 4, 3), 0, F32),
        case((40, 128), 0, F32, eps=1e-6),
        case((40, 128), 0, F32, shifted=True),
        case((4, 1, 2048), None, F32),
        rows_case(1, 2, 3001, F32),
        rows_case(140, 3, 5, F32),
        rows_case(34, 2, 40, F32, eps=3.0),
        rows_case(3, 40, 1, F32, out_dtype=BF16),
        case((5, 7), 1, BF16, g_dtype=F32),
        rows_case(140, 3, 5, BF16, g_dtype=F32),
        case((5, 7), 0, BF16),
        case((3, 4, 5), None, F64, eps=0.5),
        rows_case(140, 3, 5, F64),
        case((4, 6, 2), 1, F16),
        case((0, 3), 0, F32),
        inside,
    ]


def assert_all_same(got, want):
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)


def test_alone_or_in_a_list(monkeypatch):
    """Whatever runs beside a weight, and wherever in the list it stands."""
    split_early(monkeypatch)
    cases = mixed()
    cuts = [plan_of(c) for c in cases[:-2]]
    assert {tile.kind for _, tile in cuts} == set(Kind)
    assert {tile.kind for cut, tile in cuts if cut.split > 1} == {Kind.RUNS, Kind.STRIPS}
    alone = [run([c])[0] for c in cases]
    for c, result in zip(cases, alone, strict=True):
        assert_right(c, result)
    assert_all_same(run(cases), alone)
    assert_all_same(run(cases[::-1]), alone[::-1])
    order = random.Random(0).sample(range(len(cases)), len(cases) // 2)
    assert_all_same(run([cases[k] for k in order]), [alone[k] for k in order])


@pytest.mark.parametrize("seed", range(3))
def test_random_lists(monkeypatch, seed):
    """Shapes that nobody thought of."""
    split_early(monkeypatch, fill=8)
    draw = random.Random(seed)
    cases = []
    for _ in range(7):
        shape = draw.sample([draw.randint(1, 7), draw.randint(1, 7), draw.randint(1, 99)], k=3)
        dtype, g_dtype = draw.choice(DTYPES), draw.choice(DTYPES)
        dim = draw.choice([None, 0, 1, 2])
        eps, shifted = draw.choice([0.0, 1.0]), draw.random() < 0.3
        cases.append(case(shape, dim, dtype, g_dtype=g_dtype, eps=eps, shifted=shifted))
    alone = [run([c])[0] for c in cases]
    for c, result in zip(cases, alone, strict=True):
        assert_right(c, result)
    assert_all_same(run(cases), alone)


def test_the_same_weight_twice(monkeypatch):
    split_early(monkeypatch)
    c = rows_case(1, 2, 3001)
    (alone,) = run([c])
    assert_all_same(run([c, c]), [alone, alone])


def test_run_after_run(monkeypatch):
    split_early(monkeypatch)
    cases = mixed()[4:8]
    first = run(cases)
    for _ in range(2):
        assert_all_same(run(cases), first)


def finishes(launches, direction):
    return [launch.finish for launch in launches if launch.kernel.startswith(direction)]


@pytest.mark.parametrize("count", [1, 2, 40])
def test_one_launch_each_way(monkeypatch, count):
    launches = record_launches(monkeypatch)
    cases = [case((2 + k % 3, 5), k % 2) for k in range(count)]
    for c, result in zip(cases, run(cases), strict=True):
        assert_right(c, result)
    which = "one" if count == 1 else "list"
    assert [launch.kernel for launch in launches] == [f"forward_{which}", f"backward_{which}"]
    assert all(launch.finish == 0 for launch in launches)


@pytest.mark.parametrize("others", [0, 1, 5])
def test_two_launches_each_way_if_something_is_split(monkeypatch, others):
    """The second has none but the programs of what is split."""
    split_early(monkeypatch)
    launches = record_launches(monkeypatch)
    split = [rows_case(1, 2, 3001), rows_case(140, 3, 5)][: 1 if others == 0 else 2]
    cases = [*split, *(case((3, 5), 0) for _ in range(others))]
    run(cases)
    assert finishes(launches, "forward") == finishes(launches, "backward") == [0, 1]
    first, second = launches[:2]
    assert second.programs == sum(plan_of(c)[0].programs for c in split)
    assert first.programs == second.programs + others


def test_launches_for_each_combination_of_dtypes(monkeypatch):
    split_early(monkeypatch)
    launches = record_launches(monkeypatch)
    kinds = [(F32, F32, None), (F32, F32, BF16), (F32, F16, None), (BF16, F32, None)]
    cases = [case((3, 5), 0, v, g_dtype=g, out_dtype=w) for _ in range(3) for v, g, w in kinds] + [
        rows_case(1, 2, 3001, BF16, g_dtype=F32)
    ]
    run(cases)
    for direction in ("forward", "backward"):
        assert sorted(finishes(launches, direction)) == [0] * len(kinds) + [1]


def test_nothing_is_launched_for_nothing(monkeypatch):
    launches = record_launches(monkeypatch)
    assert run([]) == []
    cases = [case((0, 3), 0), case((3, 0), 0), case((2, 0, 3), None)]
    for c, result in zip(cases, run(cases), strict=True):
        assert result.w.shape == c.v.shape
        assert result.norm.eq(0).all()
        assert result.grad_g.eq(0).all()
    assert launches == []


def test_a_fused_model_takes_one_launch_each_way(monkeypatch):
    launches = record_launches(monkeypatch)
    layers = [wnkernel.weight_norm(nn.Conv1d(3, 3, 1, device=DEVICE), dim=k % 3) for k in range(5)]
    model = nn.Sequential(*layers)
    x = torch.randn(2, 3, 4, device=DEVICE)
    with wnkernel.use_backend("triton"):
        want = model(x)
        assert len(launches) == 5
        wnkernel.fuse(model)
        launches.clear()
        got = model(x)
        got.sum().backward()
    assert torch.equal(got, want)
    assert [launch.kernel for launch in launches] == ["forward_list", "backward_list"]


class Held:
    """Arrays of a list that stay where they are, and the launches of its forward."""

    def __init__(self, monkeypatch, shapes=((6, 4), (4, 9))) -> None:
        from wnkernel.backends.triton import launch

        self._launch, self._launcher = launch, launch.Launcher()
        self._batches = {}
        self.eps = 0.0
        self.built = 0
        self.arrays = [
            [randn(s).to(DEVICE), randn_g(s, 0).to(DEVICE), self.space(*s), self.space(s[0], 1)]
            for s in shapes
        ]
        original = tables.Table.at

        def at(table, addresses):
            self.built += 1
            return original(table, addresses)

        monkeypatch.setattr(tables.Table, "at", at)

    @staticmethod
    def space(*shape: int) -> Tensor:
        return torch.empty(shape, device=DEVICE)

    def batch(self):
        """The same object for the same weights, as the backend has it."""
        weights = tuple(Weight(1, *v.shape, 1, self.eps) for v, *_ in self.arrays)
        launch = self._launch
        types = launch.Types(F32, F32, F32)
        return self._batches.setdefault(weights, launch.Batch(FORWARD, types, weights, DEVICE))

    def builds(self) -> int:
        """Launch, check the results, and say how many tables that took."""
        before = self.built
        for _, _, w, norm in self.arrays:
            w.fill_(7)
            norm.fill_(7)
        columns = list(zip(*self.arrays, strict=True))
        addresses = [[t.data_ptr() for t in column] for column in columns]
        self._launcher.launch(self.batch(), addresses, {"v": columns[0], "g": columns[1]})
        for v, g, w, _ in self.arrays:
            reference.assert_close("w", w, reference.forward(v, g, 0, self.eps))
        return self.built - before


def test_tables_are_kept_while_addresses_stay(monkeypatch):
    held = Held(monkeypatch)
    assert held.builds() == 1
    assert held.builds() == 0
    held.arrays[0][0].mul_(2)  # an optimizer's step
    assert held.builds() == 0


@pytest.mark.parametrize("array", range(4), ids=["v", "g", "w", "norm"])
def test_another_address_takes_another_table(monkeypatch, array):
    held = Held(monkeypatch)
    held.builds()
    before = held.arrays[1][array]
    held.arrays[1][array] = before.clone()
    assert held.builds() == 1
    assert held.builds() == 0
    held.arrays[1][array] = before
    assert held.builds() == 0  # two alternating lists have two tables


def test_another_shape_eps_or_order_takes_another_table(monkeypatch):
    held = Held(monkeypatch, shapes=((6, 6), (4, 9)))
    held.builds()
    v, g, w, norm = held.arrays[0]
    held.arrays[0] = [v.view(4, 9), g[:4], w.view(4, 9), norm[:4]]
    assert held.builds() == 1
    held.eps = 3.0
    assert held.builds() == 1
    held.arrays.reverse()
    assert held.builds() == 1
    assert held.builds() == 0


def test_tables_do_not_pile_up(monkeypatch):
    held = Held(monkeypatch)
    held._launcher._tables = tables.Kept(2)
    first = list(held.arrays)
    others = [[[t.clone() for t in arrays] for arrays in first] for _ in range(2)]
    for arrays, builds in ((first, 1), (others[0], 1), (first, 0), (others[1], 1), (first, 0)):
        held.arrays = arrays
        assert held.builds() == builds
    held.arrays = others[0]
    assert held.builds() == 1
    assert len(held._launcher._tables._kept) == 2


def test_a_captured_launch_has_a_table_of_its_own(monkeypatch):
    """The graph runs when tables of others may be gone, and its own memory is no one else's."""
    held = Held(monkeypatch)
    monkeypatch.setattr(held._launch, "is_capturing", lambda device: True)
    assert held.builds() == 1
    assert held.builds() == 1  # nothing was kept
    monkeypatch.setattr(held._launch, "is_capturing", lambda device: False)
    assert held.builds() == 1
    monkeypatch.setattr(held._launch, "is_capturing", lambda device: True)
    assert held.builds() == 1  # nothing is taken
    monkeypatch.setattr(held._launch, "is_capturing", lambda device: False)
    assert held.builds() == 0


def test_other_streams_have_other_tables(monkeypatch):
    """A table was copied on one stream; another would not wait for it."""
    held = Held(monkeypatch)
    held.builds()
    monkeypatch.setattr(held._launch, "current_stream", lambda device: 17)
    assert held.builds() == 1
    assert held.builds() == 0


def test_threads_at_once(monkeypatch):
    split_early(monkeypatch)
    cases = [[rows_case(140, 3, 5), case((4, 6), 1)], [rows_case(1, 2, 3001), case((5, 3), 0)]]
    want = [run(c) for c in cases]
    got, errors = [[], []], []

    def work(k):
        try:
            got[k] = [run(cases[k]) for _ in range(3)]
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for results, right in zip(got, want, strict=True):
        assert len(results) == 3
        for result in results:
            assert_all_same(result, right)


def test_forward_only(monkeypatch):
    """Frozen weights: no backward, no gradients' memory."""
    launches = record_launches(monkeypatch)
    c = case((3, 5), 0)
    (w,), (norm,) = TRITON.weights([check(c.v, c.g, 0)])
    assert [launch.kernel for launch in launches] == ["forward_one"]
    assert_right_forward(c, Result(w, norm, None, None))
