"""Single weights in the benchmark: phases, and that what is timed is what its name says."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import layers, results
from benchmarks.contenders import COPY, OURS, TORCH, operators
from benchmarks.environment import environment
from benchmarks.plan import QUICK
from benchmarks.results import ALONE, FORWARD, FORWARD_BACKWARD, READ
from benchmarks.shapes import LayerCase

from ..on_the_cpu import on_the_cpu

__all__ = ["on_the_cpu"]

DIMS = [0, 1, 2, None]


def case_of(dim):
    return LayerCase((6, 4, 3), dim, "here", "Conv1d")


@pytest.mark.parametrize("dim", DIMS)
def test_the_reader_multiplies_what_the_forward_gives(dim):
    t = layers.tensors(case_of(dim), torch.float32, torch.device("cpu"))
    unit = torch.eye(12).view(2, 6, 4, 3)
    x = torch.cat([layers.forward_and_reader(lambda v, g, w=w: w, t)() for w in unit])
    assert x.abs().min() > 0
    for who, operator in operators(dim).items():
        recorded = []

        def kept(v, g, operator=operator, recorded=recorded):
            recorded.append(operator(v, g))
            return recorded[-1]

        product = layers.forward_and_reader(kept, t)()
        (w,) = recorded
        assert w.grad_fn is not None, who
        assert not product.requires_grad
        torch.testing.assert_close(product, w.detach().view(6, 12) @ x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_phase_is_measured(dtype):
    plan = dataclasses.replace(QUICK, layer_budget_s=0.0)
    rows = layers.run(case_of(0), dtype, plan, environment("cpu", None))
    phases = [FORWARD_BACKWARD, FORWARD, *([READ] if dtype == torch.float32 else [])]
    assert [(r.phase, r.contender) for r in rows] == [
        (phase, who) for phase in phases for who in (OURS, TORCH, COPY)
    ]
    arrays = {FORWARD: 2, READ: 3, FORWARD_BACKWARD: 5}
    for r in rows:
        count = 2 if r.contender == COPY else arrays[r.phase]
        assert r.bytes == count * dtype.itemsize * r.numel


def test_the_traffic_that_whole_models_are_held_against():
    assert results.ARRAYS[ALONE] == results.ARRAYS[FORWARD_BACKWARD]
