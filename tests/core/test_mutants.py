"""The tolerance table refuses what is wrong: each mutant must fail the comparison that every other
test trusts, in every dtype. FlagGems' table, say, accepts zeros for a (4096, 256) weight."""

from __future__ import annotations

import pytest
import torch

from .. import reference
from ..cases import DTYPES, randn, randn_g

# Norms over 24, 72, 192 and 576 elements: the longer the row, the smaller its projection term.
DIMS = [1, 0, 2, None]
SHAPE = (8, 24, 3)

pytestmark = [
    pytest.mark.parametrize("dtype", DTYPES, ids=str),
    pytest.mark.parametrize("dim", DIMS),
]


@pytest.fixture
def v(dtype):
    return randn(SHAPE, dtype)


@pytest.fixture
def g(v, dim, dtype):
    """As after initialisation: w = v."""
    return reference.norm(v, dim).to(dtype)


@pytest.fixture
def grad_w(dtype):
    return randn(SHAPE, dtype)


def refuse(got, expected):
    with pytest.raises(AssertionError, match="got"):
        reference.assert_close("got", got, expected)


def test_the_oracle_itself_passes(v, g, grad_w, dim, dtype):
    """The control: correct rounding is accepted."""
    for expected in (reference.forward(v, g, dim), *reference.backward(v, g, grad_w, dim)):
        reference.assert_close("got", expected.value.to(dtype), expected)


def test_zeros(v, g, grad_w, dim, dtype):
    for expected in (reference.forward(v, g, dim), *reference.backward(v, g, grad_w, dim)):
        refuse(torch.zeros_like(expected.value, dtype=dtype), expected)


def test_unnormalised(v, dim, dtype):
    g = randn_g(SHAPE, dim, dtype)
    refuse((g * v).to(dtype), reference.forward(v, g, dim))


def test_stale_weight(v, g, grad_w, dim, dtype):
    """The weight of one SGD step ago, with a learning rate of 1 %."""
    stale = reference.forward(v, g, dim).value.to(dtype)
    grad_v, grad_g = (e.value.to(dtype) for e in reference.backward(v, g, grad_w, dim))
    refuse(stale, reference.forward(v - 1e-2 * grad_v, g - 1e-2 * grad_g, dim))


def test_stale_g(v, g, grad_w, dim, dtype):
    """v is fresh, the scale is not: every element is off by the same small factor."""
    _, grad_g = reference.backward(v, g, grad_w, dim)
    step = 1e-2 * grad_g.value.sign() * g.abs()
    stale = reference.forward(v, g, dim).value.to(dtype)
    refuse(stale, reference.forward(v, (g - 2 * step).to(dtype), dim))


def test_no_projection(v, g, grad_w, dim, dtype):
    expected, _ = reference.backward(v, g, grad_w, dim)
    refuse((g / reference.norm(v, dim) * grad_w).to(dtype), expected)


def test_projection_of_the_wrong_sign(v, g, grad_w, dim, dtype):
    expected, _ = reference.backward(v, g, grad_w, dim)
    twice_unprojected = 2 * (g / reference.norm(v, dim) * grad_w).double()
    refuse((twice_unprojected - expected.value).to(dtype), expected)


def test_swapped_rows(v, g, dim, dtype):
    expected = reference.forward(v, g, dim)
    refuse(expected.value.flip(0).to(dtype), expected)


def test_one_wrong_element(v, g, dim, dtype):
    expected = reference.forward(v, g, dim)
    got = expected.value.to(dtype, copy=True)
    got.view(-1)[-1] = 0
    refuse(got, expected)


def test_one_nan(v, g, dim, dtype):
    expected = reference.forward(v, g, dim)
    got = expected.value.to(dtype, copy=True)
    got.view(-1)[0] = float("nan")
    refuse(got, expected)
