"""Same inputs, same bits: for any number of threads, alone or in a list, run after run.

Only the compiled backends promise it; the eager one does what torch does.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from wnkernel import functional as F
from wnkernel.problem import HALF_DTYPES, accumulation_dtype

from ..cases import DTYPES, randn, randn_g
from ..operators import halves
from ..reference import bits
from ..versions import needs

# (shape, dim): below any threshold for threads; rows cut into chunks; many rows per chunk;
# and 2.4 M elements, where torch itself would share the work, for every kind of dim.
CASES = [
    ((3,), 0),
    ((7, 5, 3), 1),
    ((64, 33), 0),
    ((64, 33), 1),
    ((2, 70001), 0),
    ((70001, 2), 1),
    ((3, 20011), None),
    ((5, 300, 41), 1),
    ((512, 512, 9), 0),
    ((512, 512, 9), 1),
    ((512, 512, 9), 2),
    ((512, 512, 9), None),
]


@pytest.fixture(autouse=True)
def _threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(ops, problems, out_dtype=None) -> list[list[torch.Tensor]]:
    """w, norm, grad_v and grad_g of ``(v, g, grad_w, dim)`` problems in one launch each way."""
    v, g, grad_w, dim = ([p[k] for p in problems] for k in range(4))
    eps = [0.0] * len(v)
    canonical = [-1 if d is None else d for d in dim]
    w, norm = halves(ops.forward(v, g, canonical, eps, out_dtype))
    yes = [True] * len(v)
    grad_v, grad_g = halves(ops.backward(grad_w, v, g, norm, canonical, eps, yes, yes))
    return [list(results) for results in zip(w, norm, grad_v, grad_g, strict=True)]


def problem(shape, dim, dtype):
    return randn(shape, dtype), randn_g(shape, dim, dtype), randn(shape, dtype), dim


def assert_same_bits(a, b):
    for name, x, y in zip(("w", "norm", "grad_v", "grad_g"), a, b, strict=True):
        assert x.dtype == y.dtype, name
        assert torch.equal(bits(x), bits(y)), name


def case_id(case):
    shape, dim = case
    return f"{'x'.join(map(str, shape))}-{dim}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_threads_and_runs(compiled_backend, ops, case, dtype):
    p = problem(*case, dtype)
    torch.set_num_threads(1)
    (want,) = run(ops, [p])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        (got,) = run(ops, [p])
        assert_same_bits(got, want)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_alone_or_in_a_list(compiled_backend, ops, threads):
    """All shapes and dtypes in one list: what a chunk's thread did before must not matter."""
    problems = [problem(*case, dtype) for case in CASES for dtype in DTYPES if case[0][0] != 512]
    problems += [problem(*case, torch.float32) for case in CASES if case[0][0] == 512]
    torch.set_num_threads(1)
    alone = [run(ops, [p])[0] for p in problems]
    torch.set_num_threads(threads)
    for got, want in zip(run(ops, problems), alone, strict=True):
        assert_same_bits(got, want)
    for got, want in zip(reversed(run(ops, problems[::-1])), alone, strict=True):
        assert_same_bits(got, want)


@pytest.mark.parametrize("has_nan", [False, pytest.param(True, marks=needs("bits of NaN"))])
@pytest.mark.parametrize("w_dtype", DTYPES, ids=str)
def test_v_and_w_of_any_types(compiled_backend, ops, w_dtype, has_nan):
    """Alone, in a list, and with any threads, NaN included; and the bits are those of weights of
    the types that hold v and w, rounded."""
    problems, wide = [], []
    for dtype in DTYPES:
        for shape, dim in CASES[:8]:
            v, g, grad_w = randn(shape, dtype), randn_g(shape, dim), randn(shape, w_dtype)
            if has_nan and dim == 0 and shape[0] == 2:
                v[1, 5] = torch.nan
            problems.append((v, g, grad_w, dim))
            acc = accumulation_dtype(dtype)
            wide.append((v.to(acc), g, grad_w.to(acc), dim))
    torch.set_num_threads(1)
    alone = [run(ops, [p], w_dtype)[0] for p in problems]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for got, want in zip(run(ops, problems, w_dtype), alone, strict=True):
            assert_same_bits(got, want)
    for (v, *_), other, results in zip(problems, wide, alone, strict=True):
        assert (results[0].dtype, results[2].dtype) == (w_dtype, v.dtype)
        if v.dtype == w_dtype == torch.bfloat16:
            continue  # whose sums have an order of their own
        for got, want in zip(results, run(ops, [other])[0], strict=True):
            rounded = want.float() if got.dtype in HALF_DTYPES else want
            assert torch.equal(got.nan_to_num(0.5), rounded.to(got.dtype).nan_to_num(0.5))


@pytest.mark.parametrize("dim", [0, 1, 2, None])
def test_only_one_gradient_wanted(compiled_backend, ops, dim):
    """Leaving out a gradient changes no bit of the other."""
    v, g, grad_w, _ = p = problem((40, 41, 42), dim, torch.float32)
    ((_, norm, grad_v, grad_g),) = run(ops, [p])
    d = -1 if dim is None else dim
    (only_v,) = ops.backward([grad_w], [v], [g], [norm], [d], [0.0], [True], [False])
    assert torch.equal(only_v, grad_v)
    (only_g,) = ops.backward([grad_w], [v], [g], [norm], [d], [0.0], [False], [True])
    assert torch.equal(only_g, grad_g)
    only_v, none = ops.backward_one(grad_w, v, g, norm, d, 0.0, True, False)
    assert torch.equal(only_v, grad_v)
    assert none.numel() == 0
    none, only_g = ops.backward_one(grad_w, v, g, norm, d, 0.0, False, True)
    assert torch.equal(only_g, grad_g)
    assert none.numel() == 0


def test_through_autograd(compiled_backend, ops):
    """The functional API has the bits of the operators."""
    for case in CASES[:8]:
        v, g, grad_w, dim = p = problem(*case, torch.float32)
        ((w, _, grad_v, grad_g),) = run(ops, [p])
        v, g = v.clone().requires_grad_(), g.clone().requires_grad_()
        again = F.weight_norm(v, g, dim)
        again.backward(grad_w)
        assert torch.equal(again, w)
        assert torch.equal(v.grad, grad_v)
        assert torch.equal(g.grad, grad_g)
