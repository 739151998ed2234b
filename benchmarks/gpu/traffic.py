"""The least bytes that a weight norm has to move, which every figure is compared with.

Where a row (backward: of v and of grad_w) stays on the chip between the reduction and the scaling,
forward reads v and writes w, two arrays of v's size, and backward reads v and grad_w and writes
grad_v, three. Where it does not, both passes count: three and five. g and the norms are small and
not counted. For a copy, bytes read and bytes written both count.
"""

from __future__ import annotations

import torch

from wnkernel.backends.base import Backend
from wnkernel.backends.triton.plan import VECTOR_BYTES, plan
from wnkernel.problem import Problem, canonical_dim, row_view

from ..shapes import LayerCase
from .plan import REAL

FORWARD, BACKWARD = "forward", "backward"

ONE_PASS = {FORWARD: 2, BACKWARD: 3}
TWO_PASSES = {FORWARD: 3, BACKWARD: 5}

ROW_ON_CHIP = 8192
"""Elements of a contiguous row that a backend is believed to keep, if it does not say."""


def arrays(phase: str, p: Problem, backend: Backend) -> int:
    """The traffic of a phase in arrays of v's size.

    A backend can say ``fits_on_chip(problem)`` itself.
    """
    own = getattr(backend, "fits_on_chip", None)
    fits = _fits(p) if own is None else own(p)
    return (ONE_PASS if fits else TWO_PASSES)[phase]


MOST_LAUNCHES = 4
"""Of a list: two forward, two backward."""


def model_launches(name: str, backend: str) -> int:
    """Kernels of a fused model in float32; the most there can be, if the backend does not say."""
    known = {n: cases for models in REAL.models.values() for n, cases in models.items()}
    if name not in known:
        return MOST_LAUNCHES
    may_split = {"triton": _is_split, "cuda": _is_no_row}.get(backend, lambda case: True)
    return MOST_LAUNCHES if any(map(may_split, known[name])) else MOST_LAUNCHES // 2


def _is_split(case: LayerCase) -> bool:
    v = torch.empty(case.shape, device="meta")
    view = row_view(v, canonical_dim(case.dim, v.ndim))
    vector = VECTOR_BYTES // v.element_size()
    return plan(view.outer, view.rows, view.inner, v.element_size(), vector).split > 1


def _is_no_row(case: LayerCase) -> bool:
    """Whether the rows do not lie one after the other, short enough for a block to keep."""
    v = torch.empty(case.shape, device="meta")
    view = row_view(v, canonical_dim(case.dim, v.ndim))
    return view.outer > 1 or view.inner > ROW_ON_CHIP


def _fits(p: Problem) -> bool:
    rows = row_view(p.v, p.dim)
    return rows.outer == 1 and rows.inner <= ROW_ON_CHIP
