"""The description of a weight norm: dim rules, memory-order rules and argument checks.

This file makes every ``dim`` canonical, and all code that computes takes a canonical ``dim``.
csrc/problem.cpp is the twin for the compiled operators, and tests/core/test_problem.py checks that
the two agree.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

WHOLE_TENSOR = -1
"""The canonical ``dim`` of one norm over the whole tensor, as in :mod:`torch.nn.utils`."""

HALF_DTYPES = (torch.float16, torch.bfloat16)
FLOAT_DTYPES = (*HALF_DTYPES, torch.float32, torch.float64)


@dataclass(frozen=True)
class RowView:
    """A dense tensor seen as ``[outer, rows, inner]`` in memory order, one norm per row."""

    outer: int
    rows: int
    inner: int


@dataclass(frozen=True)
class Problem:
    """One checked weight norm ``w = g * v / max(norm(v), eps)``; build it with :func:`check`.

    A negative eps, which public functions refuse, is added to the norm: ``w = g * v / (norm(v) -
    eps)``, as in EDM2 (Karras et al. 2024, https://arxiv.org/abs/2312.02696).
    """

    v: Tensor
    g: Tensor
    dim: int
    """The canonical dim: :data:`WHOLE_TENSOR` or ``0 <= dim < v.ndim``."""
    eps: float
    out_dtype: torch.dtype

    @property
    def norm_dims(self) -> tuple[int, ...]:
        """The dimensions that each norm sums over."""
        return tuple(k for k in range(self.v.ndim) if k != self.dim)

    @property
    def acc_dtype(self) -> torch.dtype:
        """The dtype that norms are computed in: float64 for float64, float32 for the others."""
        return accumulation_dtype(self.v.dtype)

    @property
    def divisor_dtype(self) -> torch.dtype:
        """The dtype that norms are rounded to before w divides by them. It is :attr:`acc_dtype`,
        except for one norm over all of v where v and g have half dtypes. There it is g's dtype, as
        in torch, so that the norm of v as g gives w = v."""
        are_half = self.v.dtype in HALF_DTYPES and self.g.dtype in HALF_DTYPES
        return self.g.dtype if are_half and self.g.numel() == 1 else self.acc_dtype

    @property
    def bound(self) -> float:
        """``eps`` as computations use it, see :func:`bound_of`."""
        return bound_of(self.eps, self.acc_dtype)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for float32 and the half types."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def bound_of(eps: float, acc_dtype: torch.dtype) -> float:
    """``eps`` for computations in ``acc_dtype``: 0, or at least the smallest normal number of that
    dtype. Smaller numbers have few digits or none there, and their reciprocals are infinite."""
    smallest = torch.finfo(acc_dtype).smallest_normal
    return smallest if 0.0 < eps < smallest else eps


def canonical_dim(dim: int | None, ndim: int) -> int:
    """Resolve ``dim`` as :func:`torch.nn.utils.parametrizations.weight_norm` does.

    ``None`` and -1 mean the whole tensor; -2, -3, ... count from the end.

    Raises:
        TypeError: if ``dim`` is neither an int nor None.
        ValueError: if ``dim`` is out of range for a tensor with ``ndim`` dimensions.
    """
    if dim is None:
        return WHOLE_TENSOR
    if type(dim) is not int:
        dim = int_of(dim)
    if not -ndim <= dim < ndim:
        raise ValueError(f"dim: expected -{ndim} <= dim < {ndim} or None, got {dim}")
    return dim if dim >= WHOLE_TENSOR else dim + ndim


def int_of(dim: SupportsIndex) -> int:
    """Convert a ``dim`` to an int; integers of numpy are accepted too.

    Raises:
        TypeError: if ``dim`` is not an integer.
    """
    if isinstance(dim, bool) or not hasattr(dim, "__index__"):
        raise TypeError(f"dim: expected an int or None, got {type(dim).__name__}")
    return operator.index(dim)


def norm_shape(shape: torch.Size, dim: int) -> tuple[int, ...]:
    """The shape of ``norm`` and ``g`` for a canonical ``dim``: () or ones around ``shape[dim]``.

    A ``g`` may have shape (1,) instead of (), see :func:`is_norm_shape`.
    """
    if dim == WHOLE_TENSOR:
        return ()
    return tuple([n if k == dim else 1 for k, n in enumerate(shape)])


def is_norm_shape(got: torch.Size, shape: torch.Size, dim: int) -> bool:
    """Whether a ``g`` of shape ``got`` fits a ``v`` of shape ``shape`` and a canonical ``dim``: it
    has the shape of :func:`norm_shape`, or (1,) for the whole tensor, because fully_shard refuses
    0-dimensional parameters. Norms and gradients have the shape of g."""
    return got == norm_shape(shape, dim) or (dim == WHOLE_TENSOR and got == (1,))


def is_dense(t: Tensor) -> bool:
    """Whether ``t`` fills its memory without gaps or repeats, in whatever order."""
    expected = 1
    for stride, size in sorted(
        (st, n) for n, st in zip(t.shape, t.stride(), strict=True) if n != 1
    ):
        if stride != expected:
            return False
        expected *= size
    return True


def row_view(v: Tensor, dim: int) -> RowView:
    """``[outer, rows, inner]`` of a dense, non-empty ``v`` for a canonical ``dim``."""
    if dim == WHOLE_TENSOR or v.shape[dim] == 1:
        return RowView(1, 1, v.numel())
    stride = v.stride(dim)
    rows = v.shape[dim]
    return RowView(v.numel() // (rows * stride), rows, stride)


def version_of(t: Tensor) -> int:
    """How many writes to ``t`` autograd has counted; 0 for inference tensors, which have no
    counter."""
    return 0 if t.is_inference() else t._version


def check_module(argument: str, module: Any) -> None:
    """Raise an error if ``module`` is not a torch.nn.Module."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{argument}: expected a torch.nn.Module, got {type(module).__name__}")


def check_v(v: Tensor, dim: int | None) -> int:
    """Check the two arguments that every function takes, and return the canonical dim.

    Raises:
        TypeError: if v is not a dense floating-point tensor.
        ValueError: if v is 0-dimensional, or ``dim`` is out of range.
    """
    return check_rows("v", v, dim)


def check_rows(name: str, t: Tensor, dim: int | None) -> int:
    """Check a tensor, called ``name`` in messages, whose rows have norms; return the canonical dim.

    Raises:
        TypeError: if ``t`` is not a dense floating-point tensor.
        ValueError: if ``t`` is 0-dimensional, or ``dim`` is out of range.
    """
    check_tensor(name, t)
    if t.ndim == 0:
        raise ValueError(f"{name}: expected at least 1 dimension, got a 0-dimensional tensor")
    return canonical_dim(dim, t.ndim)


def check_eps(eps: float, *, may_add: bool = False) -> float:
    """Check the lower bound of a norm. With ``may_add`` it may be negative, see :class:`Problem`.

    Raises:
        TypeError: if eps is not a number.
        ValueError: if eps is negative, infinite or NaN.
    """
    if not isinstance(eps, (int, float)):
        raise TypeError(f"eps: expected a number, got {type(eps).__name__}")
    # isfinite() of a dynamic float breaks torch.compile
    if not ((may_add or eps >= 0.0) and -math.inf < eps < math.inf):
        raise ValueError(f"eps: expected a finite number >= 0, got {eps}")
    return float(eps)


def check(
    v: Tensor,
    g: Tensor,
    dim: int | None,
    eps: float = 0.0,
    out_dtype: torch.dtype | None = None,
    *,
    may_add: bool = False,
) -> Problem:
    """Check the arguments of a weight norm. With ``may_add`` eps may be negative.

    Raises:
        TypeError: if an argument has the wrong type, layout or dtype.
        ValueError: if a shape, device, dim or eps is wrong.
    """
    dim = check_v(v, dim)
    check_g(g, v, dim)
    eps = check_eps(eps, may_add=may_add)
    if out_dtype is None:
        out_dtype = v.dtype
    elif out_dtype not in FLOAT_DTYPES:
        raise TypeError(f"out_dtype: expected {_FLOAT_NAMES}, got {out_dtype}")
    return Problem(v, g, dim, eps, out_dtype)


def list_of(name: str, entries: object) -> list[Any]:
    """An argument that has an entry for each weight, as a list. The list may be the argument
    itself, so it must not be changed.

    Raises:
        TypeError: if the argument is a single value, or a tensor, which would be split into its
            rows.
    """
    if type(entries) is list:
        return entries
    if isinstance(entries, (Tensor, str)) or not isinstance(entries, Iterable):
        raise TypeError(
            f"{name}: expected a sequence with an entry for each weight, "
            f"got {type(entries).__name__}"
        )
    return list(entries)


def check_lengths(count: int, **lists: Sequence[object]) -> None:
    """Check that lists have an entry for each of ``count`` weights.

    Raises:
        ValueError: if a list has another length.
    """
    for name, entries in lists.items():
        if len(entries) != count:
            raise ValueError(f"{name}: expected {count} entries (one per v), got {len(entries)}")


def check_forward(
    v: Sequence[Tensor],
    g: Sequence[Tensor],
    dim: Sequence[int | None],
    eps: Sequence[float],
    out_dtype: torch.dtype | None = None,
    *,
    may_add: bool = False,
) -> list[Problem]:
    """Check the arguments of a list of weight norms. With ``may_add`` eps may be negative.

    Raises:
        TypeError: as for :func:`check`.
        ValueError: as for :func:`check`, or if lists have different lengths or weights are on
            different devices.
    """
    check_lengths(len(v), g=g, dim=dim, eps=eps)
    weights = zip(v, g, dim, eps, strict=True)
    problems = [check(*weight, out_dtype, may_add=may_add) for weight in weights]
    for k, t in enumerate(v):
        if t.device != v[0].device:
            raise ValueError(f"v: expected all on {v[0].device}, entry {k} is on {t.device}")
    return problems


def check_backward(
    grad_w: Sequence[Tensor],
    v: Sequence[Tensor],
    g: Sequence[Tensor],
    norm: Sequence[Tensor],
    dim: Sequence[int],
    eps: Sequence[float],
    need_v: Sequence[int],
    need_g: Sequence[int],
) -> list[Problem]:
    """Check the arguments of the first derivatives of a list.

    Raises:
        TypeError: if a tensor has the wrong kind or dtype.
        ValueError: as for :func:`check_forward`, or if a gradient or norm has the wrong shape or
            device.
    """
    check_lengths(len(v), g=g, dim=dim, eps=eps, grad_w=grad_w, norm=norm)
    check_lengths(len(v), need_v=need_v, need_g=need_g)
    problems = check_forward(v, g, dim, eps, may_add=True)
    for p, grad, n in zip(problems, grad_w, norm, strict=True):
        _check_grad_w(grad, p)
        _check_norm(n, p)
    return problems


_FLOAT_NAMES = "float16, bfloat16, float32 or float64"


def check_tensor(name: str, t: Tensor) -> None:
    """Raise a TypeError if ``t`` is not a dense floating-point tensor."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
    if t.layout != torch.strided or t.is_quantized:
        kind = "quantized" if t.is_quantized else str(t.layout)
        raise TypeError(f"{name}: expected a dense strided tensor, got a {kind} one")
    if t.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected dtype {_FLOAT_NAMES}, got {t.dtype}")


def _check_device(name: str, t: Tensor, v: Tensor, name_of_v: str = "v") -> None:
    if t.device != v.device:
        expected = f"{v.device} (that of {name_of_v})"
        raise ValueError(f"{name}: expected device {expected}, got {t.device}")


def check_g(g: Tensor, v: Tensor, dim: int, name: str = "g", name_of_v: str = "v") -> None:
    """Check a tensor with a number for each row of ``v``, for a canonical dim.

    Raises:
        TypeError: if ``g`` is not a dense floating-point tensor.
        ValueError: if it has another shape or is on another device.
    """
    check_tensor(name, g)
    _check_device(name, g, v, name_of_v)
    if not is_norm_shape(g.shape, v.shape, dim):
        expected = "[] or [1]" if dim == WHOLE_TENSOR else str(list(norm_shape(v.shape, dim)))
        raise ValueError(
            f"{name}: expected shape {expected} for {name_of_v} of shape {list(v.shape)} and dim "
            f"{dim}, got {list(g.shape)}"
        )


def _check_grad_w(grad_w: Tensor, p: Problem) -> None:
    check_tensor("grad_w", grad_w)
    _check_device("grad_w", grad_w, p.v)
    if grad_w.shape != p.v.shape:
        raise ValueError(
            f"grad_w: expected shape {list(p.v.shape)} (that of v), got {list(grad_w.shape)}"
        )


def _check_norm(norm: Tensor, p: Problem) -> None:
    check_tensor("norm", norm)
    _check_device("norm", norm, p.v)
    if norm.shape != p.g.shape:
        raise ValueError(
            f"norm: expected shape {list(p.g.shape)} (that of g), got {list(norm.shape)}"
        )
    if norm.dtype != p.acc_dtype:
        raise TypeError(f"norm: expected dtype {p.acc_dtype}, got {norm.dtype}")
