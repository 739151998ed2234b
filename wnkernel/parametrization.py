"""The drop-in layer API: ``weight_norm(module)``, its parametrization, and the way back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm as TorchWeightNorm
from torch.nn.utils.parametrize import remove_parametrizations

from . import functional
from .checkpoint import (
    WeightNormOriginals,
    legacy_hooks,
    legacy_keys,
    register_load_hook,
    split_weight,
    unregister_load_hook,
)
from .problem import WHOLE_TENSOR, check_eps, check_v


class Owner(Protocol):
    """What computes a weight together with others; see wnkernel/grouping."""

    def read(self, v: Tensor, g: Tensor, dim: int, eps: float) -> Tensor:
        """``w``, as fresh as :func:`wnkernel.functional.weight_norm` would give it."""


class WeightNorm(nn.Module):
    """The parametrization ``(g, v) -> w``: what ``module.parametrizations[name][0]`` is.

    Args:
        dim: the dimension that keeps its norms apart; ``None`` and -1 mean the whole tensor.
        eps: lower bound of the norm, see :func:`wnkernel.functional.weight_norm`.
    """

    def __init__(self, dim: int | None = 0, *, eps: float = 0.0) -> None:
        super().__init__()
        self.dim = WHOLE_TENSOR if dim is None else dim
        self.eps = eps

    def forward(self, weight_g: Tensor, weight_v: Tensor) -> Tensor:
        return functional.weight_norm(weight_v, weight_g, self.dim, eps=self.eps)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """``(g, v)`` that give ``weight``."""
        return split_weight(weight, self.dim, self.eps)

    def extra_repr(self) -> str:
        return f"dim={self.dim}" + (f", eps={self.eps}" if self.eps else "")


_MODULE_CALL = nn.Module.__call__


class WeightNormList(WeightNormOriginals):
    """torch's ``ParametrizationList`` with a short way through when it holds one weight norm.

    ``nn.Module.__call__`` and the generic loop over parametrizations cost several times the
    operator itself. Hooks (on the list, on the weight norm or on all modules), further or other
    parametrizations, parameters that are not plain entries (DataParallel replicas, FSDP views) and
    tracers that replace ``nn.Module.__call__`` (torch.fx) take torch's way.
    """

    owner: Owner | None = None
    """The group that it is in."""

    def __call__(self) -> Tensor:
        parameters, modules = self._parameters, self._modules
        norm = modules.get("0")
        if (
            type(norm) is WeightNorm
            and len(modules) == 1
            and "original0" in parameters
            and "original1" in parameters
            and nn.Module.__call__ is _MODULE_CALL
            and not _has_hooks(self)
            and not _has_hooks(norm)
            and not _has_global_hooks()
        ):
            v, g = parameters["original1"], parameters["original0"]
            if not is_dynamo_compiling() and self.owner is not None:
                return self.owner.read(v, g, norm.dim, norm.eps)
            return functional.weight_norm(v, g, norm.dim, eps=norm.eps)
        return super().__call__()


def _shorten_property(cls: type[nn.Module], name: str) -> None:
    """Let a parametrized class find the list of a parameter without ``nn.Module.__getattr__``."""
    of_torch = getattr(cls, name)

    def get(self: nn.Module) -> Tensor:
        if parametrize._cache_enabled:
            return of_torch.fget(self)
        return self._modules["parametrizations"]._modules[name]()

    setattr(cls, name, property(get, of_torch.fset))


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _has_global_hooks() -> bool:
    return bool(
        _global_forward_hooks
        or _global_forward_pre_hooks
        or _global_backward_hooks
        or _global_backward_pre_hooks
    )


def weight_norm(
    module: nn.Module, name: str = "weight", dim: int | None = 0, *, eps: float = 0.0
) -> nn.Module:
    """Weight-normalise a parameter of ``module``: ``w = g * v / ||v||``.

    A drop-in for :func:`torch.nn.utils.parametrizations.weight_norm`: the same keys
    (``parametrizations.<name>.original0`` for g, ``.original1`` for v), the same values and the
    same tools (``parametrize.cached``, ``is_parametrized``, ``remove_parametrizations``).
    Checkpoints with the legacy keys ``<name>_g`` and ``<name>_v``, or with a plain ``<name>``, load
    too (docs/checkpoints.md).

    Args:
        module: the layer, changed in place.
        name: which of its parameters.
        dim: the dimension that keeps its norms apart (0: one per output channel of a convolution or
            linear layer). ``None`` and -1 mean one norm over the whole tensor.
        eps: lower bound of the norm, as in :func:`torch.nn.functional.normalize`; 0 as in torch.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is no module, or the parameter is not a dense floating-point tensor.
        ValueError: no such parameter, an uninitialised one, or a wrong ``dim`` or ``eps``.
        RuntimeError: the parameter is already weight-normed, by any of the three kinds.
    """
    check_module("module", module)
    if kind := weight_norm_kind(module, name):
        raise RuntimeError(
            f"name: expected a parameter without weight norm, got {name!r}, which has {kind}"
        )
    if parametrize.is_parametrized(module, name):
        raise RuntimeError(
            f"name: expected a parameter without parametrizations, got {name!r}; weight norm has "
            "to come first, others may be registered on top of it"
        )
    if module._parameters.get(name) is None:
        known = ", ".join(module._parameters) or "none"
        raise ValueError(
            f"name: expected a parameter of {type(module).__name__} (it has: {known}), got {name!r}"
        )
    weight = getattr(module, name)
    if isinstance(weight, UninitializedParameter):
        raise ValueError(
            f"name: expected an initialised parameter, got {name!r}, which is not: run the module "
            "once before applying weight norm"
        )
    check_v(weight, dim)
    register(module, name, WeightNorm(dim, eps=check_eps(eps)))
    return module


def register(module: nn.Module, name: str, norm: WeightNorm) -> None:
    """Put a weight norm on a plain parameter."""
    if parametrize.is_parametrized(module):
        own_class(module)
    parametrize.register_parametrization(module, name, norm, unsafe=True)
    make_ours(module, name)


def make_ours(module: nn.Module, name: str) -> None:
    """What is ours in a parametrized module, besides the weight norm itself."""
    cls, weights = type(module), module.parametrizations[name]
    if type(weights) in (parametrize.ParametrizationList, WeightNormOriginals):
        weights.__class__ = WeightNormList
        _shorten_property(cls, name)
    if isinstance(module, nn.RNNBase) and "__deepcopy__" in vars(cls):
        cls.__deepcopy__ = _deepcopy_rnn
    register_load_hook(module, name)


def _deepcopy_rnn(rnn: nn.RNNBase, memo: dict[int, Any]) -> nn.RNNBase:
    """As parametrize's, but an RNN also holds the weights of its last forward, and deepcopy refuses
    tensors with a history."""
    copied = memo[id(rnn)] = rnn.__new__(type(rnn))
    for w in rnn._flat_weights:
        if isinstance(w, Tensor) and not w.is_leaf:
            memo[id(w)] = w.detach().clone()
    vars(copied).update(copy.deepcopy(vars(rnn), memo))
    return copied


def remove_weight_norm(module: nn.Module, name: str = "weight") -> nn.Module:
    """Fold ``w`` back into a plain parameter ``module.<name>``; the way back from any of the three
    kinds: this package's, torch's parametrization, torch's legacy hook.

    The new Parameter requires grad if g or v did. Optimizers that held g and v do not know it.

    Args:
        module: a layer with weight norm on ``name``, changed in place.
        name: which of its parameters.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is no module.
        ValueError: ``name`` has no weight norm.
        RuntimeError: other parametrizations are stacked on the weight norm.
    """
    check_module("module", module)
    kind = weight_norm_kind(module, name)
    if kind is None:
        raise ValueError(f"name: expected a weight-normed parameter, got {name!r}, which is not")
    if kind != TORCH_HOOK and len(module.parametrizations[name]) > 1:
        stacked = ", ".join(type(p).__name__ for p in module.parametrizations[name])
        raise RuntimeError(
            f"name: expected weight norm alone on {name!r}, got {stacked}; "
            "parametrize.remove_parametrizations folds them all"
        )
    make_plain(module, name, folded_weight(module, name))
    return module


def folded_weight(module: nn.Module, name: str) -> nn.Parameter:
    """What a weight-normed parameter is when it is plain, with whatever else is stacked on the
    weight norm. The module stays as it is."""
    if weight_norm_kind(module, name) == TORCH_HOOK:
        sources = [getattr(module, key) for key in legacy_keys(name)]
        with torch.no_grad():
            w = legacy_hooks(module)[name][1].compute_weight(module)
    else:
        weights = module.parametrizations[name]
        sources = list(weights.parameters())
        with torch.no_grad(), _eval_mode(weights):  # spectral norm would iterate
            w = _MODULE_CALL(weights)  # what a group computes is the group's
    return nn.Parameter(w, requires_grad=any(p.requires_grad for p in sources))


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


def make_plain(module: nn.Module, name: str, weight: nn.Parameter) -> None:
    """Put a plain parameter in the place of a weight-normed one."""
    if weight_norm_kind(module, name) == TORCH_HOOK:
        del module._forward_pre_hooks[legacy_hooks(module)[name][0]]
        for attribute in legacy_keys(name):
            delattr(module, attribute)
        vars(module).pop(name, None)  # w of the last forward
    else:
        weights = module.parametrizations[name]
        weights.owner = None
        weights.eval()  # torch computes it once more
        own_class(module)
        remove_parametrizations(module, name)
    unregister_load_hook(module, name)
    setattr(module, name, weight)


def own_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own.

    Copies made by deepcopy share the class that parametrize made, and (un)parametrizing one more
    parameter changes properties of that class: the copies would lose their weights.
    """
    cls = type(module)
    members = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(cls)(cls.__name__, cls.__bases__, members)


OURS = "wnkernel.weight_norm"
TORCH = "torch.nn.utils.parametrizations.weight_norm"
TORCH_HOOK = "torch.nn.utils.weight_norm"


def weight_norm_kind(module: nn.Module, name: str) -> str | None:
    """Which weight norm ``module.<name>`` has: OURS, TORCH, TORCH_HOOK or None."""
    return weight_norm_kinds(module).get(name)


def weight_norm_kinds(module: nn.Module) -> dict[str, str]:
    """The weight-normed parameters of a module (not of its children), each with its kind."""
    kinds = dict.fromkeys(legacy_hooks(module), TORCH_HOOK)
    if parametrize.is_parametrized(module):
        for name, parametrizations in module.parametrizations.items():
            for p in parametrizations:
                if isinstance(p, (WeightNorm, TorchWeightNorm)):
                    kinds[name] = OURS if isinstance(p, WeightNorm) else TORCH
                    break
    return kinds


def check_module(argument: str, module: Any) -> None:
    """Refuse what is no module."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{argument}: expected a torch.nn.Module, got {type(module).__name__}")
