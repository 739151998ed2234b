"""The interfaces of backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ..problem import Problem


class Backend(Protocol):
    """Computes weight norms, and gives the reasons where it cannot."""

    name: str

    is_compiled: bool
    """Whether checks, kernels and autograd are all in ``torch.ops.wnkernel``. Every other backend
    is a :class:`PythonBackend`."""

    def missing(self) -> list[str]:
        """Return why this backend cannot run on this machine at all; empty if it can."""

    def takes(self, v: Tensor) -> bool:
        """Return whether this backend can compute a (checked) weight norm of ``v``."""

    def reasons(self, v: Tensor) -> list[str]:
        """Return why this backend cannot take ``v``; empty if it can. Use this for messages only:
        :meth:`takes` is quicker."""

    def is_automatic(self, v: Tensor) -> bool:
        """Return whether the automatic choice may choose this backend for ``v``."""

    def has_operators(self, v: Tensor) -> bool:
        """Return whether ``torch.ops.wnkernel`` runs this backend's kernels on the device of
        ``v``."""

    def norm(self, v: Tensor, g: Tensor, dim: int, eps: float) -> Tensor:
        """Return the norm that this backend's kernels compute for a weight norm, as a new tensor.
        The norm is right wherever its dtype can hold it."""


class PythonBackend(Backend, Protocol):
    """A backend that is called from Python. It computes weight norms of a list of weights and their
    first derivatives, and leaves autograd to the caller.

    The norms that :meth:`weights` returns are passed only to :meth:`gradients` of the same backend.
    There is one tensor for each weight; the rest is up to the backend.
    """

    is_traceable: bool
    """Whether this backend calls torch's operators only, which dispatch modes and fake tensors can
    follow."""

    def weights(self, problems: Sequence[Problem]) -> tuple[list[Tensor], Sequence[Tensor]]:
        """Return ``w`` and ``norm`` of every problem."""

    def forced(
        self, problems: Sequence[Problem], forced: Sequence[float]
    ) -> tuple[list[Tensor], Sequence[Tensor]]:
        """Replace the v of each problem so that its norm is the one given, unless that is 0, and
        return ``w`` and ``norm`` of the new v, as :meth:`weights` does. Each v is dense and
        plain."""

    def normalize_(self, problems: Sequence[Problem]) -> Sequence[Tensor]:
        """Write w of every problem over its v, which is dense and plain; rows of zeros stay. Return
        the norms that were there."""

    def gradients(
        self,
        problems: Sequence[Problem],
        norms: Sequence[Tensor],
        grad_ws: Sequence[Tensor],
        need_v: Sequence[bool],
        need_g: Sequence[bool],
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        """Return ``grad_v`` and ``grad_g`` of every problem, with None for those not needed."""
