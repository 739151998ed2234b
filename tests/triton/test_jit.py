"""The way from the backend to the driver, with a driver that launches nothing: bounded variants."""

from __future__ import annotations

import json

import pytest

from ..processes import python
from .cases import OLDEST_TRITON

pytest.importorskip("triton", minversion=OLDEST_TRITON, reason="needs Triton")


@pytest.fixture(scope="module", params=["cuda", "hip"])
def result(request, tmp_path_factory):
    cache = tmp_path_factory.mktemp("triton")
    done = python(
        "-m", "tests.triton.stub_driver", request.param,
        TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(cache),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_first_call_compiles_and_a_second_does_not(result):
    steps = result["steps"]
    assert steps["one"]["loaded"] == ["forward_one", "backward_one"]
    assert steps["one again"]["loaded"] == []
    assert len(steps["one again"]["launched"]) == 2


def test_sizes_and_addresses_are_not_specialised_on(result):
    assert result["steps"]["one of the same tile"]["loaded"] == []


def test_a_list_of_other_shapes_compiles_nothing(result):
    assert result["steps"]["list"]["loaded"] == ["forward_list", "backward_list"]
    assert result["steps"]["another list"]["loaded"] == []


def without_addresses(launch):
    programs, arguments = launch
    return programs, ["address" if type(a) is int and a >= 1 << 32 else a for a in arguments]


def test_a_second_launch_goes_past_the_binder_with_the_same_arguments(result):
    steps = result["steps"]
    for first, second in (("one", "one again"), ("list", "list again")):
        assert len(steps[first]["bound"]) == 2
        assert steps[second]["bound"] == []
        launches = steps[first]["launched"], steps[second]["launched"]
        for before, now in zip(*launches, strict=True):
            assert without_addresses(now) == without_addresses(before)
    assert steps["one of the same tile"]["bound"] == steps["another list"]["bound"] == []


def test_hooks_hear_what_triton_tells_them_of_a_first_launch(result):
    first, second = (result["steps"][step] for step in ("one", "one with hooks"))
    assert second["bound"] == []
    assert second["told"] == first["told"]
    names = [(when, what["name"]) for when, what in second["told"]]
    kernels = ("forward_one", "backward_one")
    assert names == [(when, kernel) for kernel in kernels for when in ("before", "after")]
    assert all(what["stream"] == 0 and what["function"] == 2 for _, what in second["told"])


def test_nothing_is_gathered_for_hooks_that_are_not_there(result):
    steps = result["steps"]
    assert steps["one again"]["told"] == []
    assert steps["one with hooks"]["described"] == [True] * 2
    assert steps["one again"]["described"] == steps["list again"]["described"] == [False] * 2


def test_variants_are_counted(result):
    assert result["variants"] == result["compiled"] == 4


def test_what_is_launched(result):
    """Programs of 32 rows of up to 128 elements, each weight by its addresses and sizes."""
    forward, backward = result["steps"]["one"]["launched"]
    assert forward[0] == backward[0] == 2
    sizes = [64, 96, 64, 96, 32, 96, 6144, 1, 1, 1]  # as Plan has them
    for _, arguments in forward, backward:
        assert any(arguments[k : k + len(sizes)] == sizes for k in range(len(arguments)))
    (programs, _), _ = result["steps"]["list"]["launched"]
    assert programs == 2 + 1 + 1  # a program each for the smaller two
