"""The parametrization: the module that computes ``w`` from g and v."""

from __future__ import annotations

from typing import Any

from torch import Tensor, is_inference_mode_enabled, nn

from . import functional
from .problem import WHOLE_TENSOR, int_of
from .splitting import split_weight


class KnowsSubclasses:
    """A base whose indirect subclasses have ``is_subclass`` set. A compiled graph guards everything
    that it reads of a module, and a guard of the type takes several times as long as a guard of an
    attribute."""

    __slots__ = ()

    is_subclass = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.is_subclass = KnowsSubclasses not in cls.__bases__


class WeightNorm(nn.Module, KnowsSubclasses):
    """The parametrization ``(g, v) -> w``, which is ``module.parametrizations[name][0]``.

    Args:
        dim: the dimension along which each index has a norm; ``None`` and -1 mean the whole tensor.
        eps: lower bound of the norm, see :func:`wnkernel.functional.weight_norm`.
    """

    def __init__(self, dim: int | None = 0, *, eps: float = 0.0) -> None:
        super().__init__()
        self.dim = WHOLE_TENSOR if dim is None else int_of(dim)
        self.eps = eps

    has_eps = True
    """Whether ``eps`` is not 0. Compiled code reads this before ``eps``: with ``dynamic=True``
    torch.compile makes every float that it reads an input of the graph, finds the input unused, and
    compiles again."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "eps":
            self.has_eps = bool(value)

    def forward(self, weight_g: Tensor, weight_v: Tensor) -> Tensor:
        return functional.weight_norm(weight_v, weight_g, self.dim, eps=self.eps)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Split ``weight`` into the ``(g, v)`` that give it."""
        if weight.is_inference() and not is_inference_mode_enabled():
            weight = weight.clone()  # what shares memory with inference tensors cannot train
        return split_weight(weight, self.dim, self.eps)

    def extra_repr(self) -> str:
        return f"dim={self.dim}" + (f", eps={self.eps}" if self.eps else "")
