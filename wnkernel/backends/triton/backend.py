"""The Triton kernels as a backend. Triton is imported when they run first."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from operator import or_
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ...forms import Problems, spread
from ...problem import Problem, row_view
from . import availability
from .arrays import dense
from .launch_table import VECTOR_BYTES, Kind, plan, tiles

if TYPE_CHECKING:
    from .launch import Launcher


class TritonBackend:
    """GPU kernels in Triton, compiled at first use: NVIDIA, AMD, Intel.

    On the CPU they run in Triton's interpreter if TRITON_INTERPRET=1 was set before Triton was
    imported: slow, and for tests, so the automatic choice leaves it alone.
    """

    name = "triton"
    is_traceable = False

    def __init__(self) -> None:
        self._used: set[torch.device] = set()
        """Devices that kernels ran on, so that nobody need ask again whether they can."""

    def missing(self) -> list[str]:
        return _listed(availability.missing())

    def reasons(self, v: Tensor) -> list[str]:
        # A graph would be compiled again as soon as the kernels have run.
        if not is_dynamo_compiling() and v.device in self._used:
            return []
        return _listed(availability.reason(v.device))

    def is_automatic(self, v: Tensor) -> bool:
        return v.device.type != "cpu"

    def forward(
        self, problems: Sequence[Problem], *, apart: bool = False
    ) -> tuple[list[Tensor], Sequence[Tensor]]:
        """``apart``: for an operator, which a compiler may run in memory that it manages. Norms
        leave the package, so each has memory of its own, and nothing that is allocated is kept."""
        if not problems:
            return [], []
        many = Problems.of(problems)
        results = self._runs.forward(self._launcher, many, apart=apart)
        self._used.add(many.v[0].device)
        return results

    def backward(
        self,
        problems: Sequence[Problem],
        norms: Sequence[Tensor],
        grad_ws: Sequence[Tensor],
        need_v: Sequence[bool],
        need_g: Sequence[bool],
        *,
        apart: bool = False,
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """``apart``: as in :meth:`forward`."""
        many = Problems.of(problems)
        live = [k for k, needs in enumerate(map(or_, need_v, need_g)) if needs]
        if len(live) == len(many):
            lists = norms, grad_ws, need_v, need_g
        else:
            many = many.at(live)
            lists = ([column[k] for k in live] for column in (norms, grad_ws, need_v, need_g))
        grads = (), ()
        if live:
            grads = self._runs.backward(self._launcher, many, *lists, apart=apart)
        grad_v, grad_g = (spread(column, live, len(problems)) for column in grads)
        return grad_v, grad_g

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
    def _runs(self) -> ModuleType:
        from . import runs

        return runs

    @cached_property
    def _launcher(self) -> Launcher:
        from .launch import Launcher

        # Two threads may get here at once, and what one of them captures belongs to its launcher.
        return vars(self).setdefault("_launcher", Launcher())


def _listed(reason: str) -> list[str]:
    return [reason] if reason else []
