"""Forced weight norm, the weight norm of EDM2 (Karras et al. 2024): its kernels and its module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from . import _autograd, composed, functional, observers
from .backends import choose
from .backends.base import PythonBackend
from .constants import Constants
from .forms import Problems
from .in_place import Rows, check_writable
from .normalizing import scale_rows
from .problem import (
    WHOLE_TENSOR,
    Problem,
    accumulation_dtype,
    check,
    check_eps,
    check_v,
    int_of,
    is_dense,
    norm_shape,
)


class Terms(NamedTuple):
    """The arguments of one weight norm, of either kind."""

    v: Any
    g: Any
    forced: float
    """The norm that v gets first; 0 leaves it as it is."""
    dim: int
    eps: float
    """Negative if it is added to the norm, see :class:`wnkernel.problem.Problem`."""
    may_add: bool = False
    """Whether eps may be negative, which it may not in a usual weight norm."""


def weights_of(weights: Sequence[Terms], out_dtype: torch.dtype | None = None) -> list[Tensor]:
    """Compute weight norms of both kinds, of which the usual ones may be unchecked, in one launch
    and one autograd node.

    Raises:
        TypeError: as for :func:`wnkernel.functional.weight_norms`.
        ValueError: as for :func:`wnkernel.functional.weight_norms`, or if weights of which one is
            forced share their v.
    """
    v, g = [w.v for w in weights], [w.g for w in weights]
    if not any(w.may_add for w in weights):
        dim, eps = [w.dim for w in weights], [w.eps for w in weights]
        return functional.weight_norms(v, g, dim, eps=eps, out_dtype=out_dtype)
    if len({id(t) for t in v}) < len(v):  # one would be read while the other is written
        raise ValueError("v: expected forced weights that share v with no other weight")
    for w in weights:
        check(w.v, w.g, w.dim, w.eps, may_add=w.may_add)
    return forced_weights(weights, out_dtype)


def forced_weights(weights: Sequence[Terms], out_dtype: torch.dtype | None = None) -> list[Tensor]:
    """Compute checked weight norms of both kinds, in one launch and one autograd node.

    Args:
        weights: the weights, on one device.
        out_dtype: dtype of all results; by default each result has the dtype of its v.
    """
    v, g = [w.v for w in weights], [w.g for w in weights]
    problems = [Problem(w.v, w.g, w.dim, w.eps, out_dtype or w.v.dtype) for w in weights]
    if is_compiling():
        return [_traced(p, w.forced) for p, w in zip(problems, weights, strict=True)]
    if not observers.are_untouched([*v, *g]) or any(t.is_neg() for t in v):
        return [_composed(p, w.forced) for p, w in zip(problems, weights, strict=True)]
    with torch.no_grad():  # v is written below autograd
        check_writable([Rows(w.v, w.dim, "v") for w in weights if w.forced])
    backend = choose(v[0])
    forced, dim, eps = ([w[k] for w in weights] for k in (2, 3, 4))
    if backend.is_compiled:
        return torch.ops.wnkernel.forced(v, g, forced, dim, eps, out_dtype)[: len(v)]
    if not all(t.is_contiguous() or is_dense(t) for t in v):
        return [_composed(p, w.forced) for p, w in zip(problems, weights, strict=True)]
    return _autograd.weight_norms(Problems.of(problems), cast(PythonBackend, backend), forced)


@torch.library.custom_op(
    "wnkernel_traced::force_",
    mutates_args=("v",),
    schema="(Tensor(a!) v, int dim, float norm, float eps) -> ()",
)
def _force_(v: Tensor, dim: int, norm: float, eps: float) -> None:
    """Replace v in a compiled graph. Inductor must not see how: to save memory it would compute
    parts of the new v once more in the backward, from a v that is no longer the old one. (torch
    2.13 gives wrong gradients for the published code of EDM2 for this reason.)"""
    scale_rows([Rows(v, dim, "v")], [norm], eps)


def _traced(p: Problem, forced: float) -> Tensor:
    if forced:
        with torch.no_grad():
            if observers.is_exporting():
                composed.forced(p, forced)
            else:
                _force_(p.v, p.dim, forced, p.eps)
    return functional.traced(p)


def _composed(p: Problem, forced: float) -> Tensor:
    if forced:
        with torch.no_grad():
            composed.forced(p, forced)
    return composed.weight_norm(p)


def _in_backward() -> bool:
    """Whether this thread runs a backward, which computes again what a forward has computed."""
    return torch._C._current_graph_task_id() != -1


class ForcedWeightNorm(nn.Module):
    r"""The parametrization ``v -> w`` of EDM2's magnitude-preserving layers.

    .. math:: w = \frac{\text{gain}}{\sqrt{N}} \, \frac{v}{\text{rms}(v) + \epsilon}

    N is the number of elements of a row, and rms(v) the root of their mean square. In training mode
    v is replaced first by ``v / (rms(v) + eps)``, in place and without autograd, which Karras et
    al. 2024 (https://arxiv.org/abs/2312.02696) call forced weight normalisation: equations 47 and
    66, and Algorithm 1, with eps where that and the authors' code have it. One launch reads v and
    writes the new v and w. Gradients are those of w with respect to the new v.

    Three differences from the authors' code: where it computes w from v again, w comes from the
    same norms here, which is equal up to rounding; for v of a half type, gradients are those of the
    new v here and of the old one there; and v keeps its dtype, in which w is returned.

    Each training forward writes to v, also the second one before an optimizer step, which changes
    v by rounding only. As with the authors' code, a graph that was made before that write raises in
    its backward. Within a fused model (:func:`wnkernel.fuse`) a forward writes once. A forward that
    runs within a backward, as activation checkpointing has it, writes nothing. With ``eps=0`` a row
    of zeros has NaN in evaluation mode, and in compiled graphs in training mode too.

    Args:
        dim: the dimension along which each index has a norm; ``None`` and -1 mean the whole tensor.
        gain: a finite number. For a gain that is learned, multiply the output of the layer.
        eps: added to rms(v); a finite number >= 0.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if ``gain`` is not finite, or ``eps`` is negative or not finite.
    """

    def __init__(self, dim: int | None = 0, gain: float = 1.0, *, eps: float = 1e-4) -> None:
        super().__init__()
        if isinstance(gain, bool) or not isinstance(gain, (int, float)):
            raise TypeError(f"gain: expected a number, got {type(gain).__name__}")
        if not math.isfinite(gain):
            raise ValueError(f"gain: expected a finite number, got {gain}")
        self.dim = WHOLE_TENSOR if dim is None else int_of(dim)
        self.gain = float(gain)
        self.eps = check_eps(eps)

    def forward(self, weight: Tensor) -> Tensor:
        return forced_weights([self.terms(weight)])[0]

    def terms(self, v: Tensor) -> Terms:
        """What kernels are given for ``v`` now.

        Raises:
            TypeError: if v is not a dense floating-point tensor.
            ValueError: if v is 0-dimensional, or ``dim`` is out of range.
        """
        dim = check_v(v, self.dim)
        rows = 1 if dim == WHOLE_TENSOR else v.shape[dim]
        root = math.sqrt(v.numel() // max(rows, 1))
        shape, dtype = norm_shape(v.shape, dim), accumulation_dtype(v.dtype)
        if is_compiling() or not observers.are_plain((v,)):
            is_forced = self.training
            g = torch.full(shape, self.gain, dtype=dtype, device=v.device)
        else:
            is_forced = self.training and not _in_backward()
            # Training has a g of its own: a group that has w of evaluation must force v.
            use = "forced" if self.training else ""
            g = Constants(v.device).get(self.gain, shape, dtype, use)
        return Terms(v, g, root if is_forced else 0.0, dim, -self.eps * root, may_add=True)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """``weight`` itself: what is assigned to a layer's weight becomes v."""
        return weight

    def extra_repr(self) -> str:
        return f"dim={self.dim}, gain={self.gain}, eps={self.eps}"
