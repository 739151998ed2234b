"""The least bytes that a weight norm has to move, which every figure is compared with.

Where a row (backward: of v and of grad_w) stays on the chip between the reduction and the scaling,
forward reads v and writes w, two arrays of v's size, and backward reads v and grad_w and writes
grad_v, three. Where it does not, both passes count: three and five. g and the norms are small and
not counted. For a copy, bytes read and bytes written both count.
"""

from __future__ import annotations

from wnkernel.backends.base import Backend
from wnkernel.problem import Problem, row_view

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


def _fits(p: Problem) -> bool:
    rows = row_view(p.v, p.dim)
    return rows.outer == 1 and rows.inner <= ROW_ON_CHIP
