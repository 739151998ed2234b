"""Errors of normalize_after_step, which leave no hook behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer

from wnkernel import normalize_after_step

from ..messages import message
from .training import model


@contextmanager
def unhooked(optimizer: Optimizer) -> Iterator[None]:
    """Nothing is left with the optimizer; of all optimizers, every test is asked that."""
    yield
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dims of an optimizer": ({"dim": [0, 0]}, TypeError, "dim, norm: expected one for all"),
    "norms of an optimizer": ({"norm": [1.0, 1.0]}, TypeError, "dim, norm: expected one for all"),
    "a norm": ({"norm": torch.ones(5, 1)}, TypeError, "dim, norm: expected one for all"),
    "dim": ({"dim": 2}, ValueError, message("dim", "-2 <= dim < 2", "2")),
    "dim of a type": ({"dim": 0.5}, TypeError, message("dim", "an int or None", "float")),
    "norm": ({"norm": -1}, ValueError, message("norm", "a finite number", "-1")),
    "name": ({"norm": "unit"}, TypeError, message("norm", "'sqrt_numel' or 'keep'", "'unit'")),
    "eps": ({"eps": float("nan")}, ValueError, message("eps", "a finite number", "nan")),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_leave_nothing_behind(case: str) -> None:
    options, error, match = ERRORS[case]
    m = model()
    optimizer = SGD(m.parameters(), lr=0.1)
    with unhooked(optimizer), pytest.raises(error, match=match):
        normalize_after_step(optimizer, **options)


OF_PARAMETERS: dict[str, tuple[Callable[[], Any], dict[str, Any], type[Exception], str]] = {
    "none": (lambda: [], {}, ValueError, "optimizer_or_params: expected parameters to normalise"),
    "a tensor": (
        lambda: torch.ones(4, 3),
        {},
        TypeError,
        message("optimizer_or_params", "a sequence", "Tensor"),
    ),
    "a model": (
        lambda: nn.Linear(4, 3),
        {},
        TypeError,
        message("optimizer_or_params", "a sequence", "Linear"),
    ),
    "names": (
        lambda: nn.Linear(4, 3).named_parameters(),
        {},
        TypeError,
        message("optimizer_or_params[0]", "a torch.Tensor", "tuple"),
    ),
    "integers": (
        lambda: [torch.ones(4, 3), torch.ones(4, 3).int()],
        {},
        TypeError,
        message("optimizer_or_params[1]", "dtype", "torch.int32"),
    ),
    "0-d": (
        lambda: [torch.ones(())],
        {},
        ValueError,
        message("optimizer_or_params[0]", "at least 1 dim", "0-dim"),
    ),
    "dims": (lambda: [torch.ones(4, 3)], {"dim": [0, 0]}, ValueError, "^dim: expected 1 entries"),
    "norms": (lambda: [torch.ones(4, 3)], {"norm": [1, 1]}, ValueError, "^norm: expected 1 entr"),
    "a norm": (
        lambda: [torch.ones(4, 3)],
        {"norm": torch.ones(3, 1)},
        ValueError,
        message("norm", r"shape \[4, 1\] for optimizer_or_params\[0\]", r"\[3, 1\]"),
    ),
}


@pytest.mark.parametrize("case", OF_PARAMETERS)
def test_errors_of_parameters_leave_nothing_behind(case: str) -> None:
    """For all optimizers, as every test is asked."""
    make, options, error, match = OF_PARAMETERS[case]
    with pytest.raises(error, match=match):
        normalize_after_step(make(), **options)


def test_an_optimizer_without_rows() -> None:
    optimizer = SGD([nn.Parameter(torch.ones(4))], lr=0.1)
    match = "^optimizer_or_params: expected parameters to normalise, got none$"
    with unhooked(optimizer), pytest.raises(ValueError, match=match):
        normalize_after_step(optimizer)
