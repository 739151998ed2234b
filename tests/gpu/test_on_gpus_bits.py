"""The same bits from run to run, alone and in a list, of every dtype and every way of cutting."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from .. import reference
from ..cases import DTYPES
from .on_gpus import SHAPES, assert_same_bits, results, weights

RUNS = 20


@pytest.mark.parametrize("together", [False, True], ids=["singly", "listed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_from_run_to_run(gpu_backend, dtype, together):
    """Beside other work, so that programs come and go in another order."""
    chosen = weights(dtype)
    first = results(chosen, together=together)
    other = torch.cuda.Stream()
    busy = torch.randn(1 << 22)
    other.wait_stream(torch.cuda.current_stream())
    for _ in range(RUNS):
        with torch.cuda.stream(other):
            for _ in range(8):
                busy.mul_(1.0)
        assert_same_bits(results(chosen, together=together), first)


@pytest.mark.parametrize(("dtype", "g_dtype"), list(product(DTYPES, DTYPES)), ids=str)
def test_alone_or_in_a_list(gpu_backend, dtype, g_dtype):
    chosen = weights(dtype, g_dtype)
    alone = results(chosen, together=False)
    assert_same_bits(results(chosen, together=True), alone)
    count = len(chosen)
    back = results(chosen[::-1], together=True)
    parts = [back[k * count : (k + 1) * count][::-1] for k in range(3)]
    assert_same_bits([t for part in parts for t in part], alone)


@pytest.mark.parametrize(
    ("dtype", "out_dtype"), [pair for pair in product(DTYPES, DTYPES) if len({*pair}) == 2], ids=str
)
def test_alone_or_in_a_list_with_another_dtype_of_the_result(gpu_backend, dtype, out_dtype):
    chosen = weights(dtype, out_dtype=out_dtype)
    alone = results(chosen, together=False, out_dtype=out_dtype)
    assert_same_bits(results(chosen, together=True, out_dtype=out_dtype), alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_they_are_the_right_ones(gpu_backend, name, dtype):
    """Weights larger than those of the tests that run everywhere."""
    (c,) = weights(dtype, names=[name])
    w, grad_v, grad_g = results([c], together=False)
    reference.assert_close("w", w, reference.forward(c.v, c.g, c.dim))
    want_v, want_g = reference.backward(c.v, c.g, c.grad_w, c.dim)
    reference.assert_close("grad_v", grad_v, want_v)
    reference.assert_close("grad_g", grad_g, want_g)
