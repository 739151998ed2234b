"""The contracts that backends keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ..problem import Problem


class Backend(Protocol):
    """Something that can run weight norms, and says why when it cannot."""

    name: str

    is_compiled: bool
    """Whether ``torch.ops.wnkernel`` is all there is to call: checks, kernels and autograd. All
    others are :class:`PythonBackend`."""

    def missing(self) -> list[str]:
        """Why this backend cannot run on this machine at all; empty when it can."""

    def takes(self, v: Tensor) -> bool:
        """Whether it can take a (checked) weight norm of ``v``."""

    def reasons(self, v: Tensor) -> list[str]:
        """Why it cannot take it; empty when it can. For messages: :meth:`takes` is quicker."""

    def is_automatic(self, v: Tensor) -> bool:
        """Whether nobody has to ask for it by name to have it take ``v``."""

    def has_operators(self, v: Tensor) -> bool:
        """Whether ``torch.ops.wnkernel`` runs its kernels where ``v`` is."""

    def norm(self, v: Tensor, g: Tensor, dim: int, eps: float) -> Tensor:
        """The norm that its kernels compute for these arguments of a weight norm, right wherever
        its dtype holds it, in memory of its own."""


class PythonBackend(Backend, Protocol):
    """A backend called from Python: weight norms and first derivatives of a list, no autograd.

    Norms travel from :meth:`forward` to :meth:`backward` of the same backend and are its own
    business, but for their number: one tensor per problem.
    """

    is_traceable: bool
    """Whether it is made of torch's operators, which dispatch modes and fake tensors see."""

    def forward(self, problems: Sequence[Problem]) -> tuple[list[Tensor], Sequence[Tensor]]:
        """``w`` and ``norm`` of every problem."""

    def backward(
        self,
        problems: Sequence[Problem],
        norms: Sequence[Tensor],
        grad_ws: Sequence[Tensor],
        need_v: Sequence[bool],
        need_g: Sequence[bool],
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        """``grad_v`` and ``grad_g`` of every problem, None where not needed."""
