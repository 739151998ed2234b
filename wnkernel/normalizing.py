"""``normalize_(tensors, dim)`` scales rows of tensors to given norms, in place and in one launch.

This is a weight norm whose g is no parameter and whose w takes the place of v, so its kernels are
those of :func:`wnkernel.functional.weight_norms`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils.weak import WeakTensorKeyDictionary

from . import composed, functional, observers
from .backends import choose
from .backends.base import Backend, PythonBackend
from .constants import Constants
from .in_place import Rows, check_writable, entries_of, is_sequence, rows_of
from .problem import (
    WHOLE_TENSOR,
    Problem,
    accumulation_dtype,
    check_eps,
    check_g,
    is_dense,
    list_of,
    norm_shape,
)

Norm: TypeAlias = float | str | Tensor
"""The norms of the rows of one tensor: a number, a tensor with a number for each row, or a rule,
which is :data:`SQRT_NUMEL` or :data:`KEEP`."""

SQRT_NUMEL = "sqrt_numel"
KEEP = "keep"


def normalize_(
    tensors: Tensor | Iterable[Tensor],
    dim: int | None | Sequence[int | None] = 0,
    *,
    norm: Norm | Sequence[Norm] = 1.0,
    eps: float = 0.0,
    return_norms: bool = False,
) -> Any:
    r"""Scale every row of one or many tensors to a norm, in place.

    .. math:: v \leftarrow r \, \frac{v}{\max(\lVert v \rVert_2, \epsilon)}

    A row is what one index along ``dim`` selects, as in :func:`wnkernel.functional.weight_norm`.
    All tensors of one device are computed in one launch (on a GPU in one for each dtype), and rows
    that a cache or the registers can hold are read once and written once. Norms are sums in float32
    or, for float64, in float64. Rows of zeros stay zeros, and rows with NaN become NaN. Nothing is
    recorded for autograd. Each tensor's version counter goes up by one, as with other operators in
    place, so autograd and groups (:func:`wnkernel.fuse`) see the write.

    docs/normalize.md says when to use this, and when weight norm or a forced weight norm.

    Args:
        tensors: a tensor or an iterable of tensors, each of any shape with at least one dimension
            and in any memory order; float16, bfloat16, float32 or float64. Tensors of one call may
            differ in shape, dtype and device, but may not share memory.
        dim: the dimension along which each index has a norm. ``None`` and -1 mean one norm over the
            whole tensor; -2, -3, ... count from the end. For several tensors it may be a sequence
            with an entry for each.
        norm: r. A finite number >= 0; or a tensor with a number for each row, of any of these
            dtypes, on the tensor's device and of the shape that
            :func:`wnkernel.functional.norm_except_dim` returns; or ``"sqrt_numel"``, the root of
            the number of elements of a row, which gives elements a mean square of 1 (the unit
            magnitude of Karras et al. 2024, https://arxiv.org/abs/2312.02696); or ``"keep"``, the
            norms that the last call of :func:`norms_of` with this tensor and ``dim`` returned. For
            several tensors it may be a sequence with an entry for each.
        eps: lower bound of the norm that rows are divided by, as in
            :func:`torch.nn.functional.normalize`. A row with a smaller norm gets less than r.
        return_norms: whether to return the norms.

    Returns:
        None, or with ``return_norms`` the norms that the rows had: a tensor, or a list of them if
        ``tensors`` is an iterable, in float32 or, for float64, in float64.

    Raises:
        TypeError: if an argument has the wrong type, layout or dtype.
        ValueError: if a shape, device, ``dim``, ``norm`` or ``eps`` is wrong, tensors share memory,
            or ``norm`` is ``"keep"`` and :func:`norms_of` was not called.
        RuntimeError: if a tensor requires grad and grad mode is on, a tensor is an inference tensor
            outside of inference mode, the memory of a tensor was freed, or the backend chosen by
            :func:`wnkernel.use_backend` cannot run. After one of these errors no tensor has
            changed; if memory runs out, some may have.
    """
    if not isinstance(tensors, Tensor):
        tensors = list_of("tensors", tensors)
    relevant = (tensors,) if isinstance(tensors, Tensor) else tensors
    if has_torch_function(relevant):
        options: dict[str, Any] = {"norm": norm, "eps": eps, "return_norms": return_norms}
        return handle_torch_function(normalize_, relevant, tensors, dim, **options)
    rows = rows_of(tensors, dim)
    check_writable(rows)
    norms = scale_rows(rows, targets_of(norm, rows, keep=_remembered), check_eps(eps))
    if not return_norms:
        return None
    return norms[0] if isinstance(tensors, Tensor) else norms


def norms_of(tensors: Tensor | Iterable[Tensor], dim: int | None | Sequence[int | None] = 0) -> Any:
    """The norms of the rows of one or many tensors, which ``normalize_(norm="keep")`` gives back.

    Call this outside of functions that torch.compile compiles with ``fullgraph=True``.

    The norms are remembered for each tensor and ``dim`` until the next call or until the tensor is
    gone; copies of the tensor do not have them. :func:`wnkernel.functional.norm_except_dim` returns
    norms that are not remembered.

    Args:
        tensors: as for :func:`normalize_`.
        dim: as for :func:`normalize_`.

    Returns:
        A tensor, or a list of them if ``tensors`` is an iterable: new tensors without grad, in
        float32 or, for float64, in float64, of the shape that
        :func:`wnkernel.functional.norm_except_dim` returns.

    Raises:
        TypeError: if an argument has the wrong type, layout or dtype.
        ValueError: if a tensor is 0-dimensional, or ``dim`` is wrong.
    """
    rows = rows_of(tensors, dim)
    norms = [functional.norms_in_full(row.t, row.dim) for row in rows]
    for row, found in zip(rows, norms, strict=True):
        _found.setdefault(row.t, {})[row.dim] = found.clone()
    return norms[0] if isinstance(tensors, Tensor) else norms


_found = WeakTensorKeyDictionary()
"""What :func:`norms_of` found, for each tensor by canonical dim."""


def _remembered(t: Tensor, dim: int) -> Tensor:
    found = _found.get(t, {}).get(dim)
    if found is None:
        raise ValueError(
            f"norm: 'keep' expects that norms_of was called before with the tensor of shape "
            f"{list(t.shape)} and dim {dim}, which it was not"
        )
    return found


def targets_of(
    norm: Any, rows: Sequence[Rows], keep: Callable[[Tensor, int], Tensor]
) -> list[float | Tensor]:
    """What the argument ``norm`` means for each tensor: a number, or a tensor with a number for
    each row. ``keep`` returns the norms of a tensor that are to be kept, for a canonical dim.

    Raises:
        TypeError: if an entry is no number, tensor or name of a rule.
        ValueError: if a number, a shape or a device is wrong, or entries are missing.
    """
    is_one = not is_sequence(norm)
    names = ["norm" if is_one else f"norm[{k}]" for k in range(len(rows))]
    entries = entries_of("norm", norm, len(rows))
    return [_target(*each, keep) for each in zip(entries, rows, names, strict=True)]


def _target(norm: Any, rows: Rows, name: str, keep: Callable[[Tensor, int], Tensor]) -> Any:
    t, dim, name_of_t = rows
    if isinstance(norm, str) and norm == KEEP:
        norm = keep(t, dim)
    if isinstance(norm, Tensor):
        check_g(norm, t, dim, name, name_of_t)
        if (is_distributed := observers.is_distributed(t)) != observers.is_distributed(norm):
            kind = "a DTensor" if is_distributed else "no DTensor"
            raise TypeError(
                f"{name}: expected {kind}, as {name_of_t} is, got {type(norm).__name__}"
            )
        return norm.detach().reshape(norm_shape(t.shape, dim))
    if isinstance(norm, str) and norm == SQRT_NUMEL:
        count = 1 if dim == WHOLE_TENSOR else t.shape[dim]
        return math.sqrt(t.numel() // max(count, 1))
    if isinstance(norm, bool) or not isinstance(norm, (int, float)):
        got = repr(norm) if isinstance(norm, str) else type(norm).__name__
        raise TypeError(
            f"{name}: expected a number, a Tensor, {SQRT_NUMEL!r} or {KEEP!r}, got {got}"
        )
    if not 0.0 <= norm < math.inf:
        raise ValueError(f"{name}: expected a finite number >= 0, got {norm}")
    if norm > (most := torch.finfo(accumulation_dtype(t.dtype)).max):
        raise ValueError(f"{name}: expected a number up to {most:.2g} for {t.dtype}, got {norm}")
    return float(norm)


# The work.


def scale_rows(rows: Sequence[Rows], targets: Sequence[float | Tensor], eps: float) -> list[Tensor]:
    """Scale the rows of checked tensors, and return the norms that were there. A negative eps is
    added to norms."""
    targets = _apart(rows, targets)
    launches: dict[torch.device, list[int]] = {}
    for k, (t, _, _) in enumerate(rows):
        launches.setdefault(t.device, []).append(k)
    # Every backend is chosen before anything is written, because the choice may raise an error.
    backends = {
        device: choose(rows[places[0]].t)
        for device, places in launches.items()
        if _have_kernels([rows[k].t for k in places])
    }
    norms: list[Any] = [None] * len(rows)
    with torch.no_grad():
        for device, places in launches.items():
            args = [rows[k] for k in places], [targets[k] for k in places], eps
            backend = backends.get(device)
            found = _composed(*args) if backend is None else _launched(*args, backend)
            for k, norm in zip(places, found, strict=True):
                norms[k] = norm
    return norms


def _have_kernels(tensors: list[Tensor]) -> bool:
    """Whether kernels can write to tensors of one device as they are."""
    return (
        not is_compiling()
        and observers.are_untouched(tensors)
        and not any(t.is_neg() or t.is_meta for t in tensors)
    )


def _composed(rows: Sequence[Rows], targets: Sequence[float | Tensor], eps: float) -> list[Tensor]:
    return [
        composed.normalize_(t, r, dim, eps) for (t, dim, _), r in zip(rows, targets, strict=True)
    ]


def _launched(
    rows: Sequence[Rows], targets: Sequence[float | Tensor], eps: float, backend: Backend
) -> Sequence[Tensor]:
    """Run one launch for tensors of one device. Tensors with gaps are computed in copies."""
    v = [t if t.is_contiguous() or is_dense(t) else t.contiguous() for t, _, _ in rows]
    dims = [dim for _, dim, _ in rows]
    g = _scales(rows, targets)
    if backend.is_compiled:
        norms = torch.ops.wnkernel.normalize_(v, g, dims, [eps] * len(v))
    else:
        problems = [Problem(*of, eps, of[0].dtype) for of in zip(v, g, dims, strict=True)]
        norms = cast(PythonBackend, backend).normalize_(problems)
    for (t, _, _), written in zip(rows, v, strict=True):
        if written is not t:
            t.copy_(written)
    return norms


def _apart(rows: Sequence[Rows], targets: Sequence[float | Tensor]) -> list[float | Tensor]:
    """The norms to reach, with copies of those in memory that is going to be written to."""
    if not any(isinstance(r, Tensor) for r in targets):
        return list(targets)
    tensors = [row.t for row in rows] + [r for r in targets if isinstance(r, Tensor)]
    if is_compiling() or not observers.have_addresses(tensors):
        return [r.clone() if isinstance(r, Tensor) else r for r in targets]
    written = {row.t.untyped_storage()._cdata for row in rows}
    return [
        r.clone() if isinstance(r, Tensor) and r.untyped_storage()._cdata in written else r
        for r in targets
    ]


def _scales(rows: Sequence[Rows], targets: Sequence[float | Tensor]) -> list[Tensor]:
    """The norms to reach as tensors. They get the dtype of norms, because kernels round the norm of
    a whole tensor to the type of a g of a half type."""
    constants = Constants(rows[0].t.device)
    scales = []
    for (t, dim, _), r in zip(rows, targets, strict=True):
        acc = accumulation_dtype(t.dtype)
        if isinstance(r, Tensor):
            scales.append(r.to(acc) if r.dtype.itemsize == 2 else r)
        else:
            scales.append(constants.get(r, norm_shape(t.shape, dim), acc))
    return scales
