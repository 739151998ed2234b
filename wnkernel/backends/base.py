"""The contract that every backend keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ..problem import Problem


class Backend(Protocol):
    """Computes a list of weight norms and their first derivatives, outside autograd.

    Norms travel from :meth:`forward` to :meth:`backward` of the same backend and are its own
    business, but for their number: one tensor per problem.
    """

    name: str

    def missing(self) -> list[str]:
        """Why this backend cannot run on this machine at all; empty when it can."""

    def reasons(self, v: Tensor, g: Tensor) -> list[str]:
        """Why it cannot take this problem; empty when it can."""

    def forward(self, problems: Sequence[Problem]) -> tuple[list[Tensor], list[Tensor]]:
        """``w`` and ``norm`` of every problem."""

    def backward(
        self,
        problems: Sequence[Problem],
        norms: Sequence[Tensor],
        grad_ws: Sequence[Tensor],
        need_v: Sequence[bool],
        need_g: Sequence[bool],
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """``grad_v`` and ``grad_g`` of every problem, None where not needed."""
