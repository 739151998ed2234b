"""The Triton kernels as a backend: arrays to addresses, addresses to launches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...problem import Problem, row_view
from . import availability
from .arrays import dense, ordered_like, vector_of
from .launch_table import VECTOR_BYTES, Kind, plan, tiles
from .tables import Weight

if TYPE_CHECKING:
    from .launch import Launcher


class TritonBackend:
    """GPU kernels in Triton, compiled at first use: NVIDIA, AMD, Intel.

    On the CPU they run in Triton's interpreter if TRITON_INTERPRET=1 was set before Triton was
    imported: slow, and for tests, so the automatic choice leaves it alone.
    """

    name = "triton"
    is_traceable = False

    def missing(self) -> list[str]:
        return _listed(availability.missing())

    def reasons(self, v: Tensor) -> list[str]:
        return _listed(availability.reason(v.device))

    def is_automatic(self, v: Tensor) -> bool:
        return v.device.type != "cpu"

    def forward(self, problems: Sequence[Problem]) -> tuple[list[Tensor], list[Tensor]]:
        from .launch import FORWARD, Types

        ws, norms = [], []
        batches: dict[Types, list[Weight]] = {}
        alive = []
        for p in problems:
            v, g = dense("v", p.v), dense("g", p.g).contiguous()
            w = torch.empty_like(v, dtype=p.out_dtype)
            norm = g.new_empty(g.shape, dtype=p.acc_dtype)
            alive += (v, g)
            ws.append(w)
            norms.append(norm)
            if v.numel() == 0:
                norm.zero_()
            else:
                weight = _weight(p, v, w, addresses=(v, g, w, norm))
                batches.setdefault(Types(v.dtype, g.dtype, w.dtype), []).append(weight)
        for types, weights in batches.items():
            self._launcher.launch(FORWARD, types, weights, problems[0].v.device)
        return ws, norms

    def backward(
        self,
        problems: Sequence[Problem],
        norms: Sequence[Tensor],
        grad_ws: Sequence[Tensor],
        need_v: Sequence[bool],
        need_g: Sequence[bool],
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        from .launch import BACKWARD, Types

        grad_vs: list[Tensor | None] = []
        grad_gs: list[Tensor | None] = []
        batches: dict[Types, list[Weight]] = {}
        alive = []
        for p, norm, grad_w, with_v, with_g in zip(
            problems, norms, grad_ws, need_v, need_g, strict=True
        ):
            v, g = dense("v", p.v), dense("g", p.g).contiguous()
            grad_w = ordered_like("grad_w", grad_w, v)
            grad_v = torch.empty_like(v) if with_v else None
            grad_g = torch.empty_like(g) if with_g else None
            alive += (v, g, grad_w)
            grad_vs.append(grad_v)
            grad_gs.append(grad_g)
            if v.numel() == 0:  # a row of no elements: its norm does not depend on anything
                if grad_g is not None:
                    grad_g.zero_()
            elif with_v or with_g:
                weight = _weight(
                    p, v, grad_w, grad_v, addresses=(grad_w, v, g, norm, grad_v, grad_g)
                )
                batches.setdefault(Types(v.dtype, g.dtype, grad_w.dtype), []).append(weight)
        for types, weights in batches.items():
            self._launcher.launch(BACKWARD, types, weights, problems[0].v.device)
        return grad_vs, grad_gs

    def fits_on_chip(self, p: Problem) -> bool:
        """Whether v (and grad_w) are read once only; for counting bytes."""
        view = row_view(dense("v", p.v), p.dim)
        vector = VECTOR_BYTES // p.v.element_size()
        cut = plan(view.outer, view.rows, view.inner, p.v.element_size(), vector)
        return tiles(p.v.element_size())[cut.tile].kind is Kind.ROWS

    def variants(self) -> dict[str, int] | None:
        """How many variants of the kernels this process has launched, each compiled at first use or
        taken from Triton's cache on disk, and how many one combination of dtypes can come to."""
        if self.missing():
            return None
        from .launch import most_variants

        return {
            "launched": len(self._launcher.variants),
            "at_most_per_dtypes": most_variants(),
        }

    @cached_property
    def _launcher(self) -> Launcher:
        from .launch import Launcher

        return Launcher()


def _listed(reason: str) -> list[str]:
    return [reason] if reason else []


def _weight(p: Problem, *like_v: Tensor | None, addresses: Sequence[Tensor | None]) -> Weight:
    """A line of a table. ``like_v``: the arrays that are laid out like v, v first."""
    v = like_v[0]
    view = row_view(v, p.dim)
    return Weight(
        view.outer,
        view.rows,
        view.inner,
        vector_of(*(t for t in like_v if t is not None)),
        p.eps,
        tuple([0 if t is None else t.data_ptr() for t in addresses]),
    )
