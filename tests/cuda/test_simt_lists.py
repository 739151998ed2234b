"""Lists of weights through the CUDA kernels, and their launches; see tests/cuda/test_simt.py."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from ..cases import DTYPES
from ..simt.build import missing
from ..simt.cases import (
    ASCENDING,
    DESCENDING,
    FEW_LINES,
    LIKE_V,
    LOCKSTEP,
    MOST_LINES,
    PAIRS,
    TYPES,
    Case,
    assert_right,
    backward_problem,
    case,
    differences,
    forward_problem,
    plan_of,
    run,
    run_list,
)
from ..simt.process import Worker, worker
from ..simt.protocol import Call, Problem, Rounded, Takes

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

INVALID_CONFIGURATION, LAUNCH_FAILURE = 9, 719
"""Errors of CUDA."""

ROWS = [(1, 3, 60), (1, 1, 1), (1, 40, 5), (1, 2, 1000), (1, 3, 8192)]
OTHERS = [(1, 2, 9001), (33, 3, 140), (171, 2, 3), (67, 40, 1), (35, 3, 15)]
SPLIT = [(1, 1, 1 << 15), (1300, 44, 1), (5170, 2, 3)]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with worker(tmp_path_factory) as process:
        yield process


def mixed(pairs: list[str], views: list[tuple[int, int, int]]) -> list[Case]:
    """All views in all types, in an order that mixes them, every third weight not aligned."""
    cases = [
        case(view, PAIRS[pair], g_dtype=DTYPES[k % 4], aligned=k % 3 > 0, eps=k % 2 * 0.5)
        for k, (pair, view) in enumerate((p, v) for p in pairs for v in views)
    ]
    random.Random(0).shuffle(cases)
    return cases


@pytest.mark.parametrize(
    ("pairs", "views", "order"),
    [
        (["f32"], ROWS, LOCKSTEP),
        (["f32"], ROWS + OTHERS + SPLIT, DESCENDING),
        (list(PAIRS), ROWS + OTHERS, ASCENDING),
        (["f64"], SPLIT, DESCENDING),
    ],
    ids=["rows", "every_kind", "every_type", "split"],
)
def test_a_list_has_the_bits_of_its_weights_alone(kernels, pairs, views, order):
    cases = mixed(pairs, views)
    for c, listed in zip(cases, run_list(kernels, cases, order).results, strict=True):
        assert_right(c, listed)
        assert not differences(listed, run(kernels, c))


@pytest.mark.parametrize("order", [LOCKSTEP, ASCENDING, DESCENDING])
def test_every_card_gives_the_same_bits(kernels, order):
    """However many parts of a row its blocks take, alone and in a list."""
    cases = [case(view) for view in (*SPLIT, (1150, 17, 1), (230, 2, 72))]
    cases[-1].v[:, 0] *= 1e15  # is added up again
    cases[-1].v[:80, 0] /= 1e15
    runs = [run_list(kernels, cases, order, processors=n) for n in (132, 1, 4, 58, 109, 148)]
    for c, *results in zip(cases, *(r.results for r in runs), strict=True):
        assert_right(c, results[0])
        for other in results[1:]:
            assert not differences(results[0], other)
    grids = {(r.forward[0].blocks, r.backward[1].blocks) for r in runs}
    assert len(grids) >= 3
    alone = run_list(kernels, cases[:1], order, processors=1).results
    assert not differences(alone[0], runs[0].results[0])


def test_more_weights_than_a_table_has_lines(kernels):
    cases = [case((1, 2, 4 + k % 7)) for k in range(2 * MOST_LINES + 1)]
    cases[MOST_LINES + 3] = case(SPLIT[0])
    got = run_list(kernels, cases)
    for c, listed in zip(cases, got.results, strict=True):
        assert_right(c, listed)
    for launches in (got.forward, got.backward):
        # Two full tables, the second with a split weight, and one weight that is left over.
        assert [launch.blocks for launch in launches[::3]] == [MOST_LINES, 1]
        assert [launch.blocks for launch in launches[1:3]] == [MOST_LINES - 1 + 8, 8]


@pytest.mark.parametrize(
    ("count", "kilobytes"),
    [(1, 1), (2, 10), (FEW_LINES, 10), (FEW_LINES + 1, 32), (MOST_LINES, 32), (MOST_LINES + 1, 32)],
)
def test_a_table_is_one_launch(kernels, count, kilobytes):
    """The smaller one, if it holds all."""
    got = run_list(kernels, [case((1, 1, 4)) for _ in range(count)])
    expected = [min(count, MOST_LINES)] + [1] * (count > MOST_LINES)
    assert [launch.blocks for launch in got.forward] == expected
    assert [launch.blocks for launch in got.backward] == expected
    for launch in (got.forward[0], got.backward[0]):
        assert kilobytes // 2 <= launch.argument_bytes / 1000 <= kilobytes * 1.03


def test_at_most_two_launches_for_a_pair_of_types(kernels):
    """Whatever is in the list, on the stream of the caller, and the second is for split weights."""
    for views, launches in ((ROWS, 1), (ROWS + OTHERS, 1), (ROWS + OTHERS + SPLIT, 2)):
        cases = [case(view) for view in views]
        plans = [plan_of(kernels, c) for c in cases]
        blocks = [sum(p.blocks for p in plans), sum(p.blocks for p in plans if p.parts > 1)]
        got = run_list(kernels, cases)
        for each in (got.forward, got.backward):
            assert [launch.blocks for launch in each] == blocks[:launches]
            assert all(launch.on_stream and launch.threads == 256 for launch in each)
    cases = mixed(list(PAIRS), ROWS + OTHERS)
    got = run_list(kernels, cases)
    assert len(got.forward) == len(got.backward) == len(PAIRS)


def test_one_workspace_for_all_split_weights(kernels):
    """One sum for each block of a row, or one for each column of a strip; in a forward, one more
    number beside each."""
    cases = [case(view) for view in (*SPLIT, *ROWS, *SPLIT)]
    sums = sum(plan_of(kernels, c).partial_sums for c in cases)
    forward = kernels.ask(Call("forward", [forward_problem(c) for c in cases]))
    assert forward.workspaces == [2 * 4 * sums]
    norm = torch.ones(64)
    backward = kernels.ask(Call("backward", [backward_problem(c, norm[: len(c.g)]) for c in cases]))
    assert backward.workspaces == [4 * sums]
    unsplit = [forward_problem(case(view)) for view in ROWS + OTHERS]
    assert kernels.ask(Call("forward", unsplit)).workspaces == []


@pytest.mark.parametrize("name", LIKE_V)
def test_one_array_that_is_not_aligned_decides_for_all_of_its_call(kernels, name):
    """Rows of 2048 elements take more blocks then."""
    c = case((1, 9, 2048))
    aligned, unaligned = (plan_of(kernels, x) for x in (c, c._replace(shifted=LIKE_V)))
    assert aligned.blocks < unaligned.blocks
    one = c._replace(shifted=(name,))
    got = run_list(kernels, [one])
    assert_right(one, got.results[0])
    for launches, arrays in ((got.forward, ("v", "w")), (got.backward, ("v", "grad_w", "grad_v"))):
        (launch,) = launches
        assert launch.blocks == (unaligned if name in arrays else aligned).blocks


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_first_error_is_returned_and_nothing_comes_after_it(kernels, direction):
    cases = [case(view, PAIRS[pair]) for pair in ("f32", "f64") for view in ROWS + SPLIT[:1]]
    problems = [
        forward_problem(c) if direction == "forward" else backward_problem(c, c.g) for c in cases
    ]
    for k in range(4):
        failed = kernels.ask(Call(direction, problems, failing_launch=k))
        assert failed.error == LAUNCH_FAILURE
        assert len(failed.launches) == k + 1
    assert kernels.ask(Call(direction, problems)).error == 0


def huge(rows: int) -> Problem:
    """A weight of which only the plan is looked at, with a block for every row."""
    fields = {
        "outer": 2,
        "rows": rows,
        "inner": 65,
        "v_type": 2,
        "g_type": 2,
        "w_type": 2,
        "eps": 0.0,
    }
    return Problem({"v": b"", "g": b""}, {"w": 0, "norm": 0}, fields, {})


def test_more_blocks_than_a_launch_may_have(kernels):
    """One weight is an error; several are several launches."""
    refused = kernels.ask(Call("forward", [huge(2**31)]))
    assert (refused.error, refused.launches) == (INVALID_CONFIGURATION, [])
    for rows, first in ((2**30, 2**30), (2**29, 3 * 2**29)):
        failed = kernels.ask(Call("forward", [huge(rows)] * 4, failing_launch=0))
        assert failed.error == LAUNCH_FAILURE
        assert [launch.blocks for launch in failed.launches] == [first]


def test_no_weights_are_no_launch(kernels):
    for direction in ("forward", "backward"):
        none = kernels.ask(Call(direction, []))
        assert (none.error, none.launches, none.workspaces) == (0, [], [])


def test_kernels_are_there_for_the_pairs_that_they_are_compiled_for(kernels):
    taken = kernels.ask(Takes(len(DTYPES)))
    assert {(DTYPES[v], DTYPES[w]) for v, w in taken} == set(TYPES.values())


def test_the_shim_rounds_as_torch_does(kernels):
    """To nearest, ties to even, overflow and subnormal numbers included, and back without loss."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    spread = torch.randn(20_000) * torch.logspace(-45, 38, 20_000)
    for dtype, name in ((torch.float16, "half"), (torch.bfloat16, "bfloat16")):
        exact = every.view(dtype).float()
        exact = exact[exact.isfinite()].sort().values.unique()
        ties = (exact[1:].double() + exact[:-1].double()).div(2).float()
        near = [torch.nextafter(ties, torch.tensor(x)) for x in (-torch.inf, torch.inf)]
        special = torch.tensor([torch.inf, -torch.inf, torch.nan, 65519.0, 65520.0, 3.4e38, -0.0])
        x = torch.cat([exact, ties, *near, spread, special])
        bits, back = kernels.ask(Rounded(x.numpy().tobytes()))[name]
        rounded = torch.frombuffer(bytearray(bits), dtype=dtype)
        want = x.to(dtype)
        assert torch.equal(rounded.isnan(), want.isnan())
        there = ~want.isnan()
        assert torch.equal(rounded[there].view(torch.int16), want[there].view(torch.int16))
        widened = torch.frombuffer(bytearray(back), dtype=torch.float32)
        assert torch.equal(widened[there].view(torch.int32), want[there].float().view(torch.int32))
