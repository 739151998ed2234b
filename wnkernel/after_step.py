"""``normalize_after_step(optimizer)``: rows get their norm back after every optimizer step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from .functional import norms_in_full
from .in_place import is_sequence, rows_of
from .normalizing import Norm, normalize_, targets_of
from .problem import check_eps, list_of


def normalize_after_step(
    optimizer_or_params: Optimizer | Iterable[Tensor],
    dim: int | None | Sequence[int | None] = 0,
    *,
    norm: Norm | Sequence[Norm] = 1.0,
    eps: float = 0.0,
) -> RemovableHandle:
    """Call :func:`wnkernel.normalize_` on parameters after every step of their optimizer.

    This is how nGPT keeps the rows of its matrices on the unit sphere (Loshchilov et al. 2024,
    https://arxiv.org/abs/2410.01131), and, with ``dim=None`` and ``norm="keep"``, how Hyperball
    optimizers keep the norm that a matrix began with (Wen et al. 2025). Nothing is written before
    the first step; call :func:`wnkernel.normalize_` to begin on the sphere. A step that a
    ``GradScaler`` skips is no step, except with fused optimizers, for which it calls ``step()``.

    Args:
        optimizer_or_params: an optimizer, whose parameters with two and more dimensions are
            normalised, which leaves biases and gains alone; parameters that are added to it later
            join. Or the parameters themselves, an iterable, which are normalised after each step of
            any optimizer that holds them. They are not kept alive.
        dim: as for :func:`wnkernel.normalize_`. Only for an iterable it may be a sequence.
        norm: as for :func:`wnkernel.normalize_`, except that ``"keep"`` means the norms that a
            parameter has now, or after the first step if it is added to an optimizer later; move
            parameters to their device before. Only for an iterable it may be a sequence or tensors.
        eps: as for :func:`wnkernel.normalize_`.

    Returns:
        A handle with ``remove()``, which is a context manager too.

    Raises:
        TypeError: if an argument has the wrong type, or a parameter the wrong layout or dtype.
        ValueError: if ``dim``, ``norm`` or ``eps`` is wrong, or there is no parameter to normalise.
    """
    hook = _AfterStep(check_eps(eps))
    if isinstance(optimizer_or_params, Optimizer):
        if is_sequence(dim) or is_sequence(norm) or isinstance(norm, Tensor):
            raise TypeError("dim, norm: expected one for all parameters of an optimizer")
        hook.of_new = dim, norm
        hook.add(_matrices(optimizer_or_params), dim, norm)
        handle = optimizer_or_params.register_step_post_hook(hook)
    else:
        params = list_of("optimizer_or_params", optimizer_or_params)
        hook.add(params, dim, norm)
        handle = register_optimizer_step_post_hook(hook)
    if not hook.targets:
        handle.remove()
        raise ValueError("optimizer_or_params: expected parameters to normalise, got none")
    return handle


def _matrices(optimizer: Optimizer) -> list[Tensor]:
    """The parameters of an optimizer that have rows."""
    return [p for p in _parameters(optimizer) if p.ndim > 1]


def _parameters(optimizer: Optimizer) -> Iterable[Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])


class _AfterStep:
    """A hook that normalises those parameters of an optimizer that it knows."""

    def __init__(self, eps: float) -> None:
        self.eps = eps
        self.targets = WeakTensorKeyDictionary()
        """The dim and the norm of each parameter."""
        self.of_new: tuple[Any, Any] | None = None
        """The dim and the norm of parameters that an optimizer gets later."""

    def add(self, params: Sequence[Tensor], dim: Any, norm: Any) -> None:
        """Check parameters with their dims and norms, and know them from now on."""
        rows = rows_of(params, dim, "optimizer_or_params")
        norms = targets_of(norm, rows, keep=norms_in_full)
        for row, norm in zip(rows, norms, strict=True):
            self.targets[row.t] = row.dim, norm

    def __call__(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        if self.of_new is not None:
            new = [p for p in _matrices(optimizer) if p not in self.targets]
            self.add(new, *self.of_new)
        params = [p for p in _parameters(optimizer) if p in self.targets]
        if params:
            dims, norms = zip(*map(self.targets.__getitem__, params), strict=True)
            with torch.no_grad():
                normalize_(params, dims, norm=norms, eps=self.eps)
