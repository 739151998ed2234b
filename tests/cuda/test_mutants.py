"""What the tests of the CUDA kernels would find: cases like those of tests/cuda/test_simt*.py fail
for each of the faults of tests/simt/mutants*.txt, and without each barrier."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator

import pytest
import torch

from .. import reference
from ..cases import ENDS
from ..simt.build import missing
from ..simt.cases import (
    DESCENDING,
    FEW_LINES,
    LARGE,
    LIKE_V,
    MOST_LINES,
    ORDERS,
    Case,
    Result,
    assert_ends_right,
    assert_right,
    assert_right_forward,
    case,
    differences,
    run_forward,
    run_list,
)
from ..simt.formulas import assert_right_added, assert_right_forced
from ..simt.mutants import MUTANTS, NUMBERS, write
from ..simt.process import Worker, worker

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

PAIR = ("f32",)

VIEWS = [
    (1, 5, 12), (1, 9, 36), (1, 3, 132), (1, 3, 4096), (1, 2, 8192), (1, 1030, 4),
    (1, 2, 8201), (2, 2, 4100), (50, 3, 140),
    (171, 2, 3), (321, 2, 3), (267, 2, 4), (67, 21, 2), (67, 40, 1), (35, 3, 15), (67, 16, 3),
    (300, 64, 1),
]  # fmt: skip
SPLIT = [(1, 3, 32_772), (230, 2, 72), (900, 10, 4), (5170, 2, 3), (1150, 17, 1)]
PROCESSORS = (132, 2)
"""Of two cards. On the small one a block takes several parts of a row, the last fewer."""


@pytest.fixture(scope="module")
def mutated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with worker(tmp_path_factory, PAIR, "mutants", write) as process:
        yield process


def extreme(view: tuple[int, int, int], size: float = 1e30) -> Case:
    """A row whose squares leave the safe range, but for the first third of it."""
    c = case(view)
    c.v[:, 0] *= size
    outer, _, inner = view
    (c.v[: outer // 3, 0] if outer > 1 else c.v[0, 0, : inner // 3]).div_(size)
    return c


def clamped(view: tuple[int, int, int]) -> Case:
    c = case(view)
    return c._replace(eps=float(reference.norm(c.v, 1).max()) * 2)


def with_g(view: tuple[int, int, int], size: float, g: float, eps: float = 0.0) -> Case:
    c = case(view, eps=eps)
    c.v.mul_(size)
    c.g.fill_(g)
    return c


FORWARD = [(1e14, 1e-30), (1e-14, 1e30), (1e-42, 1e-5), (1e-42, 1.0, 2.0**-130)]
"""Of :func:`with_g`: what leaves the range of the backward."""


def ends_of_the_range() -> list[Case]:
    """Rows and strips for every one of :data:`ENDS`."""
    cases = []
    for view in VIEWS[::11]:
        for dtype, v, g, grad_w, eps in ENDS.values():
            if dtype == torch.float32:
                cases.append(c := case(view, eps=eps))
                for t, size in zip((c.v, c.g, c.grad_w), (v, g, grad_w), strict=True):
                    t.mul_(size)
    return cases


def bounded_by_norms(view: tuple[int, int, int]) -> Case:
    """eps is the norm, exactly."""
    c = case(view, eps=math.sqrt(view[0] * view[2]))
    c.v.sign_()
    return c


def around_a_limit(view: tuple[int, int, int]) -> Case:
    """Parts of rows are as large as others, but choose units of their own."""
    c = case(view)
    c.v.sign_().mul_(5e13)
    c.v[: view[0] // 2].div_(2)
    return c


FORCED = [(), (1e-42,), (1e-30, -1e-30), (3e-40, -1e-40)]
"""The size and eps of :func:`forced`."""


def forced(view: tuple[int, int, int], size: float = 1.0, eps: float = 0.0) -> Case:
    """The first row is one of zeros."""
    c = with_g(view, size, 2.0, eps)._replace(forced=1.0)
    c.v[:, 0] = 0
    return c


@pytest.fixture(scope="module")
def batches() -> list[list[Case]]:
    """Lists of weights, those that take long last. No test has set its seed when they are made."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make_batches()


def make_batches() -> list[list[Case]]:
    alone = [*map(case, VIEWS), *(case(view, aligned=False) for view in VIEWS[::3])]
    alone += [make(view) for make in (extreme, clamped) for view in VIEWS[::2]]
    alone += [case(view)._replace(want_v=False) for view in VIEWS[::6]]
    alone += [case(VIEWS[0])._replace(shifted=(name,)) for name in LIKE_V]
    alone += [case(VIEWS[0], g_dtype=dtype) for dtype in (torch.float16, torch.float64)]
    alone += [bounded_by_norms(view) for view in ((1, 4, 64), (64, 4, 36))]
    alone += [around_a_limit(SPLIT[2])]
    mixed = [case(view, aligned=k % 3 > 0) for k, view in enumerate(VIEWS)]
    added = [case(view, eps=-0.5) for view in (*VIEWS[::2], SPLIT[1])]
    new_v = [forced(view, *of) for view in VIEWS[::2] for of in FORCED]
    new_v += [forced(view, 1.0, -0.5) for view in SPLIT[1:3]]
    split = [*map(case, SPLIT[::2]), *(extreme(view, 1e15) for view in SPLIT[1:])]
    split.append(extreme(SPLIT[-1], 1e-20))
    many = [[case((1, 1, 4)) for _ in range(n + 1)] for n in (FEW_LINES, MOST_LINES)]
    lists = [mixed, *many, ends_of_the_range(), added, new_v]
    return [*([c] for c in alone), *lists, *([c] for c in split), split]


def assert_all_right(c: Case, result: Result) -> None:
    if c.forced:
        assert_right_forced(c, result)
    else:
        (assert_right_added if c.eps < 0 else assert_right)(c, result)


def check(mutated: Worker, batches: list[list[Case]], mutant: int = 0) -> None:
    """AssertionError for what is wrong. Orders of threads take turns; cards have to agree."""
    for of in FORWARD:
        for view in VIEWS[::4]:
            c = with_g(view, *of)
            assert_right_forward(c, *run_forward(mutated, [c], mutant=mutant).results)
    for k, cases in enumerate(batches):
        results = run_list(mutated, cases, ORDERS[k % len(ORDERS)], mutant).results
        for c, result in zip(cases, results, strict=True):
            assert_all_right(c, result)
    split = batches[-1]
    large, small = (run_list(mutated, split, DESCENDING, mutant, n).results for n in PROCESSORS)
    for c, *results in zip(split, large, small, strict=True):
        assert_right(c, results[1])
        assert not differences(*results)
    for view in LARGE:
        assert_ends_right(mutated, view, mutant)


def test_kernels_without_a_fault_pass(mutated, batches):
    check(mutated, batches)


CHOSEN = list(NUMBERS)[:: 1 if os.environ.get("WNKERNEL_MUTANTS") else 3]
"""Every third fault; `make mutants` tries all of them."""


@pytest.mark.parametrize("name", CHOSEN)
def test_a_fault_is_found(mutated, batches, name):
    with pytest.raises(AssertionError) as found:
        check(mutated, batches, NUMBERS[name])
    if name in MUTANTS:
        assert re.search(MUTANTS[name].sign, str(found.value))
