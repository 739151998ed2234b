"""The table of errors: what an ulp is there, what it finds, and how it gets into a page."""

from __future__ import annotations

import pytest
import torch

from benchmarks import accuracy
from benchmarks.contenders import OURS, TORCH
from benchmarks.environment import environment

HERE = environment("cpu", None)


@pytest.fixture(scope="module")
def errors():
    return [e for dim in (0, 1) for e in accuracy.measured(torch.float32, dim, 100, HERE)]


def test_every_result_of_both_is_measured(errors):
    found = {(e.dim, e.result, e.contender) for e in errors}
    assert len(found) == len(errors) == 2 * len(accuracy.RESULT_NAMES) * 2


def test_ours_are_off_by_rounding(errors):
    assert max(e.largest_ulps for e in errors if e.contender == OURS) < 8
    assert not accuracy.worse(errors)


def test_a_mistake_is_seen(monkeypatch):
    def without_projection(v, g, dim):
        norm = v.detach().norm(dim=1 - dim, keepdim=True)
        return v * (g / norm)

    monkeypatch.setitem(accuracy.CONTENDERS, OURS, without_projection)
    errors = list(accuracy.measured(torch.float32, 0, 100, HERE))
    of = {e.result: e.largest_ulps for e in errors if e.contender == OURS}
    assert of["w"] < 8
    assert of["grad_v"] > 1000
    assert any("grad_v" in line for line in accuracy.worse(errors))


def test_the_table_goes_between_the_marks(errors, tmp_path):
    text = accuracy.table(errors)
    assert len(text.splitlines()) == 2 + len(accuracy.RESULT_NAMES)
    begin, end = accuracy.MARKS
    page = f"before\n{begin}\nold\n{end}\nafter\n"
    new = accuracy.between_marks(page, text)
    assert new == f"before\n{begin}\n{text}\n{end}\nafter\n"
    assert accuracy.between_marks(new, text) == new
    assert accuracy.between_marks("no marks\n", text) == "no marks\n"


def test_worse_is_by_more_than_an_ulp(errors):
    ours = next(e for e in errors if e.contender == OURS)
    theirs = next(
        e for e in errors if (e.contender, e.dim, e.result) == (TORCH, ours.dim, ours.result)
    )
    for more, is_worse in ((0.9, False), (1.1, True)):
        found = accuracy.worse([ours._replace(largest_ulps=theirs.largest_ulps + more), theirs])
        assert bool(found) == is_worse
