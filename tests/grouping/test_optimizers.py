"""``reuse="version"`` and optimizers that leave no trace in the version counters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from wnkernel import weight_norm

from ..groups import assert_same, originals, ramp, twins


def layers() -> nn.Module:
    return nn.Sequential(weight_norm(nn.Linear(5, 4)), weight_norm(nn.Linear(4, 3)))


class Search(torch.optim.Optimizer):
    """Runs the model, writes through ``.data``, runs it again: a line search."""

    def __init__(self, model: nn.Module, fail: bool = False) -> None:
        super().__init__(model.parameters(), {})
        self.model, self.fail = model, fail

    def step(self, closure):
        before = closure()
        for p in originals(self.model):
            p.data.mul_(1.5)
        if self.fail:
            raise ArithmeticError("no step")
        return before, closure()


def test_a_closure_is_never_served_what_was_before_the_write():
    model, twin, _ = twins("version", layers)
    x = ramp(2, 5)
    for _ in range(2):
        got, want = (Search(m).step(lambda m=m: m(x)) for m in (model, twin))
        for a, b in zip(got, want, strict=True):
            assert_same(a, b)
        assert_same(model(x), twin(x))


def test_a_step_that_raises_half_way_is_seen():
    model, twin, _ = twins("version", layers)
    x = ramp(2, 5)
    for m in (model, twin):
        with pytest.raises(ArithmeticError):
            Search(m, fail=True).step(lambda m=m: m(x))
    assert_same(model(x), twin(x))
    for m in (model, twin):  # and the next one, invisible but for the hooks
        Search(m).step(lambda m=m: m(x))
    assert_same(model(x), twin(x))


def test_weights_are_kept_again_after_a_step_that_raised(computed):
    model, _, _ = twins("version", layers)
    search = Search(model, fail=True)
    with pytest.raises(ArithmeticError):
        search.step(lambda: model(ramp(2, 5)))
    model(ramp(2, 5))
    computed.take()
    model(ramp(2, 5))
    assert computed.take() == ([], 0)
