"""How a launch on the CPU is shared among threads: evenly, in few calls, and no bit depends on it.

A program calls the kernels with threads that run one after the other, and counts what each of them
writes. Many threads need no many cores here.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from pathlib import Path

import pytest

from ..cpu.launches import BF16, F32, F64, Launch, Weight, launches, missing, program

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

THREADS = [1, 2, 3, 8, 16, 64]
DIRECTIONS = pytest.mark.parametrize("direction", ["forward", "backward"])

# csrc/cpu/driver.cpp, plan.h
GRAIN, ROW_WORK = 8192, 32
"""Work for which there is another thread; of a row, beside its elements."""
CHUNK, STRIP = 16384, 65536
"""Elements of a chunk of a row that is too long for one; at most, of a strip."""

SIZES = {  # of caches
    "small": {"WNKERNEL_CPU_L1D": "4K", "WNKERNEL_CPU_L2": "16K", "WNKERNEL_CPU_L3": "16K"},
    "usual": {"WNKERNEL_CPU_L1D": "32K", "WNKERNEL_CPU_L2": "1M", "WNKERNEL_CPU_L3": "2M"},
    "large": {"WNKERNEL_CPU_L1D": "1M", "WNKERNEL_CPU_L2": "64M", "WNKERNEL_CPU_L3": "1024M"},
}


@pytest.fixture(scope="session")
def shares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return program(tmp_path_factory, "shares.cpp")


@pytest.fixture(params=SIZES)
def run(request: pytest.FixtureRequest, shares: Path) -> Callable[..., dict[int, Launch]]:
    """A launch with every number of threads, on a machine with caches of some size."""

    def run(direction: str, *weights: Weight) -> dict[int, Launch]:
        return launches(shares, direction, THREADS, weights, **SIZES[request.param])

    run.l1d = {"small": 4, "usual": 32, "large": 1024}[request.param] * 1024
    run.l3 = {"small": 16, "usual": 2048, "large": 1 << 20}[request.param] * 1024
    return run


def work(weight: Weight) -> int:
    return weight.numel + ROW_WORK * weight.rows


def parts(threads: int, *weights: Weight) -> int:
    """How many threads are to share the work."""
    return max(1, min(threads, sum(map(work, weights)) // GRAIN))


def done(call: list[list[int]], weights: tuple[Weight, ...]) -> list[float]:
    """The work of each thread of one call."""
    units = [work(weight) / weight.numel for weight in weights]
    return [sum(n * unit for n, unit in zip(task, units, strict=True)) for task in call]


def assert_written_once(launch: Launch, *weights: Weight) -> None:
    """Every element, by one thread."""
    tasks = [launch.outside, *(task for call in launch.calls for task in call)]
    assert [sum(n) for n in zip(*tasks, strict=True)] == [weight.numel for weight in weights]


WHOLE_ROWS = {
    "many": Weight(1, 100_000, 8),
    "square": Weight(1, 192, 192),
    "few": Weight(1, 130, 640),
    "half": Weight(1, 700, 300, BF16, BF16),
    "prime": Weight(1, 1009, 97, F64, F64),
    "long": Weight(1, 20, 60_000, F64, F64),
    "two in a cache": Weight(1, 130, 4060, BF16, BF16),
}
CUT = {  # and how many chunks of how many elements there are
    "few long rows": (Weight(1, 3, 1_000_000), 186, CHUNK),
    "whole tensor": (Weight(1, 1, 2_000_000), 123, CHUNK),
    "strips": (Weight(512, 256, 16), 32, STRIP),
}
ROWS = (Weight(1, 2000, 300), Weight(1, 40_000, 7, F64, F64), Weight(1, 64, 64))
ROWS += (Weight(1, 900, 640, F32, BF16), Weight(1, 5, 16_000))
MIXED = (Weight(1, 3, 200_000), *ROWS, Weight(128, 2048, 2), Weight(40, 24, 3))


@DIRECTIONS
@pytest.mark.parametrize("name", WHOLE_ROWS)
def test_whole_rows(run, name, direction):
    """Somebody has to have a share, rounded up; nobody has more than a third more: a share
    is some equal chunks, of as many rows as the first-level cache holds at most. Three rows, two of
    which it holds, are two chunks of two."""
    weight = WHOLE_ROWS[name]
    for threads, launch in run(direction, weight).items():
        count = parts(threads, weight)
        assert_written_once(launch, weight)
        if count == 1:
            assert not launch.calls
            continue
        (call,) = launch.calls
        rows = [n / weight.inner for (n,) in call]
        assert len(rows) == count
        assert all(n == int(n) for n in rows)
        assert max(rows) <= 4 / 3 * ceil(weight.rows / count)


@DIRECTIONS
@pytest.mark.parametrize("name", CUT)
def test_what_is_cut(run, name, direction):
    """Nobody has more chunks than a share, rounded up; nobody has none while there are some."""
    weight, chunks, size = CUT[name]
    for threads, launch in run(direction, weight).items():
        assert_written_once(launch, weight)
        if threads == 1:
            assert not launch.calls
            continue
        *_, call = launch.calls
        elements = [n for (n,) in call]
        assert len(elements) == threads
        assert max(elements) <= ceil(chunks / threads) * size
        assert sum(n > 0 for n in elements) == min(threads, chunks)


def largest_chunk(direction: str, mean: float, l1d: int, weights: tuple[Weight, ...]) -> float:
    """Work of whole rows that are done at a time: two thirds of the first-level cache, or one row;
    never more than a share, which may be half as large again where a weight is one or two."""
    size = {BF16: 2, F32: 4, F64: 8}
    chunks = []
    for w in weights:
        read = size[w.v_type] + (size[w.w_type] if direction == "backward" else 0)
        row = w.inner + ROW_WORK
        chunks.append(max(row, min(1.5 * mean, l1d * 2 / 3 / read / w.inner * row)))
    return max(chunks)


@DIRECTIONS
def test_a_list_of_whole_rows(run, direction):
    """Nobody has more than five quarters of the mean, and a chunk."""
    total = sum(map(work, ROWS))
    for threads, launch in run(direction, *ROWS).items():
        assert_written_once(launch, *ROWS)
        if threads == 1:
            assert not launch.calls
            continue
        (call,) = launch.calls
        shares, mean = done(call, ROWS), total / threads
        assert len(shares) == threads
        assert max(shares) <= 1.25 * mean + largest_chunk(direction, mean, run.l1d, ROWS)


@DIRECTIONS
def test_a_list_of_all_kinds(run, direction):
    """Nobody has more in any call than a share of all that there is, and a chunk."""
    total = sum(map(work, MIXED))
    for threads, launch in run(direction, *MIXED).items():
        assert_written_once(launch, *MIXED)
        for call in launch.calls:
            assert len(call) <= threads
            assert max(done(call, MIXED)) <= 1.25 * total / threads + STRIP


UNEVEN = {
    "strips": (Weight(32, 2049, 1),),  # 2,048 columns are as many as a strip has
    "whole rows beside": (Weight(1, 1, 1_000_000), Weight(1, 5208, 192)),  # one phase, and two
}


@DIRECTIONS
@pytest.mark.parametrize("name", UNEVEN)
def test_two_threads_map_as_much(shares, name, direction):
    """Five quarters of the mean at most. (Where a sum ends is a matter of bits, so that the last
    chunk of a row, and the last rows of a two-phase strip, are as long as they are.)"""
    weights = UNEVEN[name]
    launch = launches(shares, direction, [2], weights, **SIZES["usual"])[2]
    assert_written_once(launch, *weights)
    elements = [sum(task) for task in launch.calls[-1]]
    assert max(elements) <= 1.25 * sum(elements) / 2


@DIRECTIONS
@pytest.mark.parametrize("rows", [64, 63])
def test_a_second_thread_from_two_grains_on(run, rows, direction):
    weight = Weight(1, rows, 2 * GRAIN // 64 - ROW_WORK)
    assert (work(weight) >= 2 * GRAIN) == (rows == 64)
    for threads, launch in run(direction, weight).items():
        if rows == 63 or threads == 1:
            assert launch.outside == [weight.numel]
            assert not launch.calls
        else:
            (call,) = launch.calls
            assert len(call) == 2


CALLS = {  # and how often threads are asked for
    "rows": (Weight(1, 1000, 64), 1),
    "many rows": (Weight(1, 20_000, 64), 1),
    "some leave the range": (Weight(1, 20_000, 64, huge_rows=900), 1),
    "one-phase strips": (Weight(9, 20_000, 7), 1),
    "runs": (Weight(1, 5, 100_000), 2),  # one block of rows is finished by one thread
    "few strips": (Weight(80, 2000, 3), 3),
    "strips": (Weight(80, 6000, 3), 3),
    "strips that leave the range": (Weight(80, 6000, 3, huge_rows=900), 4),
}


@DIRECTIONS
@pytest.mark.parametrize("name", CALLS)
def test_calls_do_not_grow_with_rows(run, name, direction):
    weight, calls = CALLS[name]
    for threads, launch in run(direction, weight).items():
        assert len(launch.calls) == (calls if threads > 1 else 0)
        assert all(len(call) <= threads for call in launch.calls)


@DIRECTIONS
def test_a_long_list_takes_no_more_calls(run, direction):
    """If a cache holds what is read twice, which is 12.4 MB in a forward. If not, each such weight
    may be a batch of its own."""
    weights = [Weight(80, 2000, 3), Weight(1, 3000, 64), Weight(1, 2, 70_000)] * 5
    for threads, launch in run(direction, *weights).items():
        fits = run.l3 / 4 * 3 * threads >= 12.4e6 * (2 if direction == "backward" else 1)
        assert_written_once(launch, *weights)
        if threads == 1:
            assert not launch.calls
        elif fits:
            assert len(launch.calls) == 3
        else:
            assert 3 < len(launch.calls) <= 5 * (3 + 2)


LISTS = {name: (weight,) for name, weight in WHOLE_ROWS.items()}
LISTS |= {name: (weight,) for name, (weight, *_) in (CUT | CALLS).items()}
LISTS |= {"list of rows": ROWS, "list": MIXED}


@DIRECTIONS
@pytest.mark.parametrize("name", LISTS)
def test_bits_do_not_depend_on_threads_and_caches(shares, name, direction):
    hashes = {
        (size, threads): launch.hash
        for size in SIZES
        for threads, launch in launches(
            shares, direction, THREADS, LISTS[name], **SIZES[size]
        ).items()
    }
    assert len(hashes) == len(SIZES) * len(THREADS)
    assert len(set(hashes.values())) == 1, hashes
