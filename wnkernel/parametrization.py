"""The parametrization of a weight-normed layer, and which parameters of a module have one."""

from __future__ import annotations

from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, is_inference_mode_enabled, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
from torch.nn.utils.parametrizations import _WeightNorm as TorchWeightNorm

from . import functional
from .checkpoint import WeightNormOriginals, legacy_hooks, own_parametrizations, split_weight
from .problem import WHOLE_TENSOR, int_of


class Owner(Protocol):
    """What a weight is asked of: a group (wnkernel/grouping) or, while a layer is new,
    wnkernel/lost_writes.py."""

    is_group: bool
    """Whether it computes the weight with those of other layers."""

    def read(self, v: Tensor, g: Tensor, dim: int, eps: float) -> Tensor:
        """``w``, as fresh as :func:`wnkernel.functional.weight_norm` would give it."""

    def end(self) -> None:
        """What there is to do before another takes its place."""


class WeightNorm(nn.Module):
    """The parametrization ``(g, v) -> w``: what ``module.parametrizations[name][0]`` is.

    Args:
        dim: the dimension that keeps its norms apart; ``None`` and -1 mean the whole tensor.
        eps: lower bound of the norm, see :func:`wnkernel.functional.weight_norm`.
    """

    def __init__(self, dim: int | None = 0, *, eps: float = 0.0) -> None:
        super().__init__()
        self.dim = WHOLE_TENSOR if dim is None else int_of(dim)
        self.eps = eps

    is_subclass = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.is_subclass = True

    has_eps = True
    """Whether ``eps`` is not 0. With ``dynamic=True`` torch.compile makes every float that it reads
    an input of the graph, finds that nobody needs it, and compiles once more."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "eps":
            self.has_eps = bool(value)

    def forward(self, weight_g: Tensor, weight_v: Tensor) -> Tensor:
        return functional.weight_norm(weight_v, weight_g, self.dim, eps=self.eps)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """``(g, v)`` that give ``weight``."""
        if weight.is_inference() and not is_inference_mode_enabled():
            weight = weight.clone()  # what an inference tensor is shared with cannot be trained
        return split_weight(weight, self.dim, self.eps)

    def extra_repr(self) -> str:
        return f"dim={self.dim}" + (f", eps={self.eps}" if self.eps else "")


_MODULE_CALL, _CALL_IMPL = nn.Module.__call__, nn.Module._call_impl


class WeightNormList(WeightNormOriginals):
    """torch's ``ParametrizationList`` with a short way through when it holds one weight norm.

    ``nn.Module.__call__`` and the generic loop over parametrizations cost several times the
    operator itself. The short way is taken only where it cannot be told from torch's: not with
    hooks (on the list, on the weight norm or on all modules), further or other parametrizations,
    parameters that are not plain entries (DataParallel replicas, FSDP views), or anything replaced:
    ``forward`` on an instance (offloading) or on a class, what tracers replace in ``nn.Module``.
    """

    owner: Owner | None = None
    """Whom to ask for the weight; None: it is computed here. Compiled graphs ask nobody."""

    bucket: int | None = None
    """In a group: which launch of a compiled graph the weight joins."""

    casts: bool = False
    """In a group: whether compiled graphs compute the weight in the dtype of autocast."""

    is_subclass = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.is_subclass = True

    def __call__(self) -> Tensor:
        parameters = self._parameters
        has_both = "original0" in parameters and "original1" in parameters
        if is_dynamo_compiling():
            return self._in_graph() if has_both else super().__call__()
        if has_both and self.is_as_made():
            v, g, norm = parameters["original1"], parameters["original0"], self._modules["0"]
            owner = self.owner  # read once: a first forward in another thread may take it away
            if owner is not None:
                return owner.read(v, g, norm.dim, norm.eps)
            return functional.weight_norm(v, g, norm.dim, eps=norm.eps)
        return super().__call__()

    def _in_graph(self) -> Tensor:
        """The same where Dynamo traces it. A graph guards all that is asked here, and takes several
        times as long for the type of a module as for an attribute."""
        v, g = self._parameters["original1"], self._parameters["original0"]
        norm = self._modules.get("0")
        if (
            not isinstance(norm, WeightNorm)
            or norm.is_subclass
            or self.is_subclass
            or len(self._modules) != 1
            or not (_is_untouched(self) and _is_untouched(norm) and classes_are_as_made())
        ):
            return super().__call__()
        eps = norm.eps if norm.has_eps else 0.0
        # A copy of a part of a fused model has no owner. Others are not asked: theirs may change.
        in_group = self.bucket is not None and self.owner is not None
        out_dtype = autocast_dtype(v) if in_group and self.casts else None
        bucket = self.bucket if in_group else None
        return functional.weight_norm_in_graph(v, g, norm.dim, eps, out_dtype, bucket)

    def is_as_made(self) -> bool:
        """Whether calling it computes one weight norm and does nothing else."""
        return self.is_untouched() and classes_are_as_made()

    def is_untouched(self) -> bool:
        """The same where :func:`classes_are_as_made`."""
        modules = self._modules
        norm = modules.get("0")
        return (
            type(norm) is WeightNorm
            and type(self) is WeightNormList
            and len(modules) == 1
            and _is_untouched(self)
            and _is_untouched(norm)
        )

    def __prepare_scriptable__(self) -> NoReturn:
        """What ``torch.jit.script`` asks of every module."""
        raise RuntimeError(
            "torch.jit.script: expected a model with plain weights, got a weight norm, which "
            "TorchScript cannot compile: call wnkernel.fold(model) first, on a copy if the model "
            "is to be trained further"
        )


def autocast_dtype(v: Tensor) -> torch.dtype | None:
    """The dtype that autocast casts ``w`` to; None: it leaves it in v's.

    Autocast does not touch float64, and half types would be rounded once instead of twice.
    """
    kind = v.device.type
    if v.dtype != torch.float32 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


_NORM_FORWARD, _LIST_FORWARD = WeightNorm.forward, WeightNormList.forward


def classes_are_as_made() -> bool:
    """Whether nobody has replaced what the classes do, or hooks into all modules."""
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


def _is_untouched(module: nn.Module) -> bool:
    """Whether a module has neither hooks nor a forward of its own. Every read of a weight asks it
    twice. (The hooks would be found faster in the dictionary, but there Dynamo guards them.)"""
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
    """Whether the forward of an instance is its own method, which is what remains of Accelerate's
    hooks when they are removed."""
    forward = module.__dict__["forward"]
    own = getattr(forward, "__func__", None) is type(module).forward
    return own and forward.__self__ is module


OURS = "wnkernel.weight_norm"
TORCH = "torch.nn.utils.parametrizations.weight_norm"
TORCH_HOOK = "torch.nn.utils.weight_norm"


def weight_norm_kind(module: nn.Module, name: str) -> str | None:
    """Which weight norm ``module.<name>`` has: OURS, TORCH, TORCH_HOOK or None."""
    return weight_norm_kinds(module).get(name)


def weight_norm_kinds(module: nn.Module) -> dict[str, str]:
    """The weight-normed parameters of a module (not of its children), each with its kind."""
    kinds = dict.fromkeys(legacy_hooks(module), TORCH_HOOK)
    for name, parametrizations in own_parametrizations(module).items():
        for p in parametrizations:
            if isinstance(p, (WeightNorm, TorchWeightNorm)):
                kinds[name] = OURS if isinstance(p, WeightNorm) else TORCH
                break
    return kinds


def check_module(argument: str, module: Any) -> None:
    """Refuse what is no module."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{argument}: expected a torch.nn.Module, got {type(module).__name__}")
