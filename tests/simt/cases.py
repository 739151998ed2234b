"""Weights, and what the kernels make of them, against the oracle."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from wnkernel.problem import accumulation_dtype, check

from .. import reference
from ..cases import DTYPES, randn
from . import build
from .process import Worker
from .protocol import PROCESSORS, Call, Called, Ends, Launch, Plan, Plans, Problem, View

LOCKSTEP, ASCENDING, DESCENDING = ORDERS = range(3)
"""In which threads run: simt::Order."""

VECTOR_BYTES = 16
FEW_LINES, MOST_LINES = 64, 220
"""Of the two tables. tests/cuda/test_plan.py compares numbers with those of csrc/cuda."""
LIKE_V = ("v", "w", "grad_w", "grad_v")


LARGE = [(1, (1 << 25) + 1, 64), (2, (1 << 25) + 1, 64)]
"""Rows and runs whose offsets take more than 32 bits."""


class Types(NamedTuple):
    """Of v and w."""

    v: torch.dtype
    w: torch.dtype


F16, BF16, F32, F64 = DTYPES
TYPES = {
    "f32": Types(F32, F32),
    "f16": Types(F16, F16),
    "bf16": Types(BF16, BF16),
    "f32_f16": Types(F32, F16),
    "f32_bf16": Types(F32, BF16),
    "f64": Types(F64, F64),
}
"""Every pair, by the names of csrc/weight_norm.h."""
PAIRS = {name: TYPES[name] for name in build.PAIRS}
"""Those that are compiled here."""


class Case(NamedTuple):
    """A weight and the gradient of its result, ``[outer, rows, inner]``; g is ``[rows]``."""

    v: Tensor
    g: Tensor
    grad_w: Tensor
    eps: float = 0.0
    shifted: Sequence[str] = ()
    """Names of arrays that begin one element of v after a 16-byte boundary."""
    want_v: bool = True
    want_g: bool = True
    forced: float = 0.0
    in_place: bool = False
    """Whether w is v, the same memory."""


class Result(NamedTuple):
    """What a forward and a backward give. Gradients that are not wanted are None, as is a v that is
    not replaced."""

    w: Tensor
    norm: Tensor
    grad_v: Tensor | None
    grad_g: Tensor | None
    v: Tensor | None = None


def case(
    view: Sequence[int],
    types: Types = TYPES["f32"],
    *,
    g_dtype: torch.dtype | None = None,
    aligned: bool = True,
    **fields: object,
) -> Case:
    """Random numbers. Not ``aligned``: no array that is laid out like v."""
    v, g, grad_w = randn(view, types.v), randn(view[1:2], g_dtype or types.v), randn(view, types.w)
    return Case(v, g, grad_w, shifted=() if aligned else LIKE_V, **fields)


def vector_of(dtype: torch.dtype, aligned: bool) -> int:
    """Elements of v in an access."""
    return VECTOR_BYTES // dtype.itemsize if aligned else 1


def _bytes(t: Tensor) -> bytes:
    return t.contiguous().view(torch.uint8).numpy().tobytes()


def _tensor(data: bytes, dtype: torch.dtype, like: Tensor) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype).view(like.shape)


def _fields(c: Case) -> dict[str, int | float]:
    types = zip(("v_type", "g_type", "w_type"), (c.v, c.g, c.grad_w), strict=True)
    view = zip(("outer", "rows", "inner"), c.v.shape, strict=True)
    return {k: DTYPES.index(t.dtype) for k, t in types} | dict(view) | {"eps": c.eps}


def _offsets(c: Case) -> dict[str, int]:
    return dict.fromkeys(c.shifted, c.v.element_size())


def forward_problem(c: Case) -> Problem:
    norm = c.g.numel() * accumulation_dtype(c.v.dtype).itemsize
    outputs = {"w": c.grad_w.nbytes, "norm": norm}
    divisor = check(c.v, c.g.view(1, -1, 1), 1).divisor_dtype
    fields = _fields(c) | {"divisor_type": DTYPES.index(divisor), "forced": c.forced}
    outputs |= {"v": c.v.nbytes} if c.forced else {}
    same = {"w": "v"} if c.in_place else {}
    return Problem({"v": _bytes(c.v), "g": _bytes(c.g)}, outputs, fields, _offsets(c), same)


def backward_problem(c: Case, norm: Tensor) -> Problem:
    inputs = {name: _bytes(getattr(c, name)) for name in ("v", "g", "grad_w")}
    wanted = {"grad_v": c.v.nbytes if c.want_v else 0, "grad_g": c.g.nbytes if c.want_g else 0}
    outputs = {name: size for name, size in wanted.items() if size}
    return Problem(inputs | {"norm": _bytes(norm)}, outputs, _fields(c), _offsets(c))


class Run(NamedTuple):
    """A forward and a backward of a list."""

    results: list[Result]
    forward: list[Launch]
    backward: list[Launch]


def run_list(
    worker: Worker,
    cases: Iterable[Case],
    order: int = LOCKSTEP,
    mutant: int = 0,
    processors: int = PROCESSORS,
) -> Run:
    """All of them in one call each way; the backward has the v that the forward leaves."""
    cases, how = list(cases), {"order": order, "mutant": mutant, "processors": processors}
    forward = run_forward(worker, cases, **how)
    left = [
        c if r.v is None else c._replace(v=r.v) for c, r in zip(cases, forward.results, strict=True)
    ]
    problems = [backward_problem(c, r.norm) for c, r in zip(left, forward.results, strict=True)]
    backward: Called = worker.ask(Call("backward", problems, **how))
    assert backward.error == 0
    grads = [
        [
            _tensor(o[name], like.dtype, like) if name in o else None
            for name, like in (("grad_v", c.v), ("grad_g", c.g))
        ]
        for o, c in zip(backward.outputs, cases, strict=True)
    ]
    results = [
        Result(r.w, r.norm, *both, r.v) for r, both in zip(forward.results, grads, strict=True)
    ]
    return Run(results, forward.forward, backward.launches)


def run_forward(worker: Worker, cases: Sequence[Case], **how: int) -> Run:
    """Without gradients."""
    called: Called = worker.ask(Call("forward", [forward_problem(c) for c in cases], **how))
    assert called.error == 0
    results = [
        Result(
            _tensor(o["w"], c.grad_w.dtype, c.v),
            _tensor(o["norm"], accumulation_dtype(c.v.dtype), c.g),
            None,
            None,
            _tensor(o["v"], c.v.dtype, c.v) if c.forced else None,
        )
        for o, c in zip(called.outputs, cases, strict=True)
    ]
    return Run(results, called.launches, [])


def run(worker: Worker, c: Case, order: int = LOCKSTEP) -> Result:
    """One weight alone."""
    (result,) = run_list(worker, [c], order).results
    return result


def plan_of(worker: Worker, c: Case) -> Plan:
    vector = vector_of(c.v.dtype, not c.shifted)
    (plan,) = worker.ask(Plans([View(*c.v.shape, c.v.element_size(), vector)]))
    return plan


def assert_right(c: Case, r: Result) -> None:
    """Everything that is wanted against the oracle."""
    assert_right_forward(c, r)
    g = c.g.view(1, -1, 1)
    want_v, want_g = reference.backward(c.v, g, c.grad_w, 1, c.eps)
    if c.want_v:
        reference.assert_close("grad_v", r.grad_v, want_v)
    if c.want_g:
        reference.assert_close("grad_g", r.grad_g.view_as(g), want_g)


def assert_right_forward(c: Case, r: Result) -> None:
    """w and the norms."""
    g = c.g.view(1, -1, 1)
    want = reference.forward(c.v, g, 1, c.eps)
    reference.assert_close("w", r.w, want)
    norm = reference.norm(c.v, 1)
    reference.assert_close("norm", r.norm.view_as(g), replace(want, value=norm, scale=norm))


def assert_ends_right(worker: Worker, view: Sequence[int], mutant: int = 0) -> None:
    """The first and the last row of a weight that may be larger than memory."""
    size = math.sqrt(view[0] * view[2])
    for number, (norm, w) in enumerate(worker.ask(Ends(view, mutant)), 1):
        assert norm == pytest.approx(number * size)
        assert w == pytest.approx([3 / size] * len(w))


def differences(a: Result, b: Result) -> list[str]:
    """Names of what has other bits. NaN is NaN, whatever its bits."""

    def bits(t: Tensor | None) -> bytes:
        return b"" if t is None else _bytes(torch.where(t.isnan(), torch.nan, t))

    pairs = zip(Result._fields, a, b, strict=True)
    return [name for name, x, y in pairs if bits(x) != bits(y)]
