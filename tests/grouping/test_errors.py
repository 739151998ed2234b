"""Errors within a launch: one weight's fault is its own, and what is nobody's fault comes out."""

from __future__ import annotations

import pytest
import torch

from wnkernel import functional

from ..groups import LAYERS, Computed, assert_same, both_modes, twins, weights
from ..messages import message


@both_modes
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("out of memory"), RuntimeError("Triton Error: launch failed")],
    ids=lambda error: type(error).__name__,
)
def test_what_fails_for_no_weight_is_not_tried_one_by_one(
    monkeypatch, computed: Computed, error, reuse
):
    model, twin, _ = twins(reuse)

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(functional, "weight_norms", fail)
        with pytest.raises(type(error), match=str(error)):
            model()
    assert computed.take() == ([], 0)
    assert_same(model(), twin(), "output")
    assert computed.take() == ([len(LAYERS)], len(LAYERS))  # of the twin


@both_modes
def test_a_weight_without_memory_spoils_no_other(compiled_backend, computed: Computed, reuse):
    model, twin, group = twins(reuse)
    bad = "back.image"
    model.get_submodule(bad).parametrizations.weight.original1.untyped_storage().resize_(0)
    want = weights(twin)
    with group.scope():
        for name in (name for name in LAYERS if name != bad):
            assert_same(model.get_submodule(name).weight, want[name], name)
        with pytest.raises(RuntimeError, match=message("v", "with memory", "freed")):
            _ = model.get_submodule(bad).weight
