"""The list of parametrizations of a weight-normed layer, and its fast path."""

from __future__ import annotations

from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from . import functional
from .checkpoint import WeightNormOriginals
from .forcing import Terms
from .keys import G, V
from .norm_module import KnowsSubclasses, WeightNorm


class Owner(Protocol):
    """An object that computes the weight for a list: a member of a group (wnkernel/grouping) or,
    while a layer is new, its watch (wnkernel/lost_writes.py)."""

    is_group: bool
    """Whether the owner computes the weight together with those of other layers."""

    def read(self, v: Tensor, g: Tensor, dim: int, eps: float) -> Tensor:
        """Return ``w``, equal to what :func:`wnkernel.functional.weight_norm` would compute now."""


_MODULE_CALL, _CALL_IMPL = nn.Module.__call__, nn.Module._call_impl


class WeightNormList(WeightNormOriginals, KnowsSubclasses):
    """torch's ``ParametrizationList`` with a fast path for a list that holds one weight norm.

    ``nn.Module.__call__`` and the generic loop over parametrizations take several times as long as
    the operator itself. The fast path is taken only if it has the same effect as torch's code. So
    it is not taken if there are hooks (on the list, on the weight norm or on all modules), other
    parametrizations, or parameters that are not plain entries (DataParallel replicas, FSDP views),
    or if a method has been replaced: ``forward`` of an instance (offloading) or of a class, or the
    methods of ``nn.Module`` that tracers replace.
    """

    owner: Owner | None = None
    """The object that computes the weight. If this is None, the list computes it. Compiled graphs
    never call the owner."""

    bucket: int | None = None
    """The launch of a compiled graph that the weight joins; None outside of groups."""

    casts: bool = False
    """Whether compiled graphs compute the weight in the dtype of autocast; used only in groups."""

    def __call__(self) -> Tensor:
        parameters: dict[str, Any] = self._parameters
        has_both = G in parameters and V in parameters
        if is_dynamo_compiling():
            return self._in_graph() if has_both else super().__call__()
        if has_both and self.is_as_made():
            v, g = parameters[V], parameters[G]
            norm: Any = self._modules["0"]
            owner = self.owner  # read once, since another thread's first forward may reset it
            if owner is not None:
                return owner.read(v, g, norm.dim, norm.eps)
            return functional.weight_norm(v, g, norm.dim, eps=norm.eps)
        return super().__call__()

    def _in_graph(self) -> Tensor:
        """Compute the weight in code that Dynamo traces. A graph guards everything that is read
        here, and a guard of the type of a module takes several times as long as a guard of an
        attribute."""
        v: Any
        g: Any
        v, g = self._parameters[V], self._parameters[G]
        norm = self._modules.get("0")
        if (
            not isinstance(norm, WeightNorm)
            or norm.is_subclass
            or self.is_subclass
            or len(self._modules) != 1
            or not (
                module_is_untouched(self) and module_is_untouched(norm) and classes_are_as_made()
            )
        ):
            return super().__call__()
        eps = norm.eps if norm.has_eps else 0.0
        # A copy of a part of a fused model has a bucket but no owner. Lists without a bucket do
        # not read their owner, because the graph would guard it and it may change.
        in_group = self.bucket is not None and self.owner is not None
        out_dtype = autocast_dtype(v) if in_group and self.casts else None
        bucket = self.bucket if in_group else None
        return functional.weight_norm_in_graph(v, g, norm.dim, eps, out_dtype, bucket)

    def terms(self) -> Terms:
        """What kernels are given for this weight now, without checks."""
        parameters: dict[str, Any] = self._parameters
        norm: Any = self._modules["0"]
        return Terms(parameters.get(V), parameters.get(G), 0.0, norm.dim, norm.eps)

    def is_as_made(self) -> bool:
        """Whether a call of the list computes one weight norm and does nothing else."""
        return self.is_untouched() and classes_are_as_made()

    def is_untouched(self) -> bool:
        """Whether :meth:`is_as_made` holds if :func:`classes_are_as_made` does."""
        modules = self._modules
        norm = modules.get("0")
        return (
            type(norm) is WeightNorm
            and type(self) is WeightNormList
            and len(modules) == 1
            and module_is_untouched(self)
            and module_is_untouched(norm)
        )

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse ``torch.jit.script``, which calls this on every module."""
        raise RuntimeError(
            "torch.jit.script: expected a model with plain weights, got a weight norm, which "
            "TorchScript cannot compile: call wnkernel.fold(model) first, on a copy if the model "
            "is to be trained further"
        )


def autocast_dtype(v: Tensor) -> torch.dtype | None:
    """The dtype that autocast casts ``w`` to; None if ``w`` keeps v's dtype.

    Autocast does not cast float64. A half ``w`` is cast afterwards, because a direct result would
    be rounded once instead of twice.
    """
    kind = v.device.type
    if v.dtype != torch.float32 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


_NORM_FORWARD, _LIST_FORWARD = WeightNorm.forward, WeightNormList.forward


def classes_are_as_made() -> bool:
    """Whether nobody has replaced methods of the classes or registered hooks on all modules."""
    return (
        WeightNorm.forward is _NORM_FORWARD
        and WeightNormList.forward is _LIST_FORWARD
        and WeightNorm.__call__ is _MODULE_CALL
        and WeightNormOriginals.__call__ is _MODULE_CALL
        and WeightNorm._call_impl is _CALL_IMPL
        and WeightNormList._call_impl is _CALL_IMPL
        and not (
            _global_forward_hooks
            or _global_forward_pre_hooks
            or _global_backward_hooks
            or _global_backward_pre_hooks
        )
    )


def module_is_untouched(module: nn.Module) -> bool:
    """Whether a module has neither hooks nor a forward of its own. Every read of a weight calls
    this twice. Reading the hooks from ``__dict__`` would be faster, but Dynamo would guard them
    there."""
    state = module.__dict__
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "_compiled_call_impl" in state
        or "_call_impl" in state
        or ("forward" in state and not _has_that_of_its_class(module))
    )


def _has_that_of_its_class(module: nn.Module) -> bool:
    """Whether the ``forward`` in the dict of an instance is the method of its class. Accelerate
    leaves it there when its hooks are removed."""
    forward = module.__dict__["forward"]
    own = getattr(forward, "__func__", None) is type(module).forward
    return own and forward.__self__ is module
