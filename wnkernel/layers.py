"""The drop-in layer API: ``weight_norm(module)`` and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import remove_parametrizations

from .aliases import forget_legacy_names, pruned_original
from .census import (
    TORCH_HOOK,
    check_parameter,
    legacy_hooks,
    parametrizations_of,
    stacked_in,
    weight_norm_kind,
)
from .checkpoint import WeightNormOriginals, register_load_hook, unregister_load_hook
from .keys import legacy_keys
from .lost_writes import FirstReads, stop_watching
from .module_class import adopt_class, own_class, share_class
from .norm_module import WeightNorm
from .parametrization import WeightNormList
from .problem import check_eps, check_module
from .removal import RemovalHook, add_removal_hook, take_removal_hook

M = TypeVar("M", bound=nn.Module)


@torch.inference_mode(False)
def weight_norm(module: M, name: str = "weight", dim: int | None = 0, *, eps: float = 0.0) -> M:
    """Weight-normalise a parameter of ``module``: ``w = g * v / ||v||``.

    This is a drop-in replacement for :func:`torch.nn.utils.parametrizations.weight_norm`. It has
    the same keys (``parametrizations.<name>.original0`` for g, ``.original1`` for v) and works with
    the same tools (``parametrize.cached``, ``is_parametrized``, ``remove_parametrizations``). The
    weight keeps its value. g is the ``max(norm, eps)`` that the kernel divides by, so its last bits
    may differ from torch's. Checkpoints with the legacy keys ``<name>_g`` and ``<name>_v``, or with
    a plain ``<name>``, load too (docs/checkpoints.md). The formula is that of Salimans & Kingma
    2016, see :func:`wnkernel.functional.weight_norm`.

    Args:
        module: the layer, changed in place.
        name: the name of the parameter.
        dim: the dimension along which each index has a norm; 0 gives one norm per output channel of
            a convolution or linear layer. ``None`` and -1 mean one norm over the whole tensor.
        eps: lower bound of the norm, as in :func:`torch.nn.functional.normalize`; 0 as in torch.

    Returns:
        ``module``.

    Raises:
        TypeError: if ``module`` is not a torch.nn.Module, or the parameter is not a dense
            floating-point tensor.
        ValueError: if there is no such parameter, if it is uninitialised, or if ``dim`` or ``eps``
            is wrong.
        RuntimeError: if the parameter already has a weight norm, of any of the three kinds, or
            another parametrization.
    """
    check_module("module", module)
    if kind := weight_norm_kind(module, name):
        raise RuntimeError(
            f"name: expected a parameter without weight norm, got {name!r}, which has {kind}: "
            "cannot register two weight_norm hooks on the same parameter"
        )
    if parametrize.is_parametrized(module, name):
        raise RuntimeError(
            f"name: expected a parameter without parametrizations, got {name!r}; weight norm has "
            "to come first, others may be registered on top of it"
        )
    check_parameter(module, name, dim)
    register(module, name, WeightNorm(dim, eps=check_eps(eps)))
    update_flat_weights(module, name)
    share_class(module)
    return module


def register(module: nn.Module, name: str, norm: WeightNorm) -> None:
    """Put a weight norm on a plain parameter."""
    if parametrize.is_parametrized(module):
        own_class(module)
    parametrize.register_parametrization(module, name, norm, unsafe=True)
    make_ours(module, name)


def update_flat_weights(module: nn.Module, name: str) -> None:
    """Put the current weight into the flat weights of an RNN, as its first forward would do.
    Parameters that a subclass adds are not in the flat weights."""
    if not isinstance(module, nn.RNNBase) or name not in module._flat_weights_names:
        return
    with torch.no_grad():
        weights = parametrizations_of(module, name)
        w = nn.Module.__call__(weights)  # weights() would watch it for lost writes
    module._flat_weights[module._flat_weights_names.index(name)] = w


def make_ours(module: nn.Module, name: str) -> None:
    """Give a parametrized module all parts of this package besides the weight norm itself."""
    weights: Any = parametrizations_of(module, name)
    of_torch, cls = (parametrize.ParametrizationList, WeightNormOriginals), type(weights)
    is_plain = cls in of_torch
    if is_plain or (parametrize.is_parametrized(weights) and cls.__base__ in of_torch):
        if is_plain:
            weights.__class__ = WeightNormList
        else:  # g or v is parametrized itself, and the list has a class of its own
            own_class(weights)
            type(weights).__bases__ = (WeightNormList,)
        adopt_class(module, name)
        weights.owner = FirstReads(weights, f"{name} of a {type(module).__name__}")
    register_load_hook(module, name)
    add_removal_hook(module, RemovalHook(name, weights[0].dim, remove_weight_norm))


@torch.inference_mode(False)
def remove_weight_norm(module: M, name: str = "weight") -> M:
    """Replace a weight-normed parameter ``module.<name>`` by a plain parameter that holds ``w``.
    This works for all three kinds: this package's, torch's parametrization and torch's legacy hook.

    The new Parameter requires grad if g or v did. Optimizers that hold g and v do not get it.

    Args:
        module: a layer with weight norm on ``name``, changed in place.
        name: the name of the parameter.

    Returns:
        ``module``.

    Raises:
        TypeError: if ``module`` is not a torch.nn.Module.
        ValueError: if ``name`` has no weight norm.
        RuntimeError: if other parametrizations are stacked on the weight norm, or g or v is pruned.
    """
    check_module("module", module)
    kind = weight_norm_kind(module, name)
    if kind is None:
        raise ValueError(f"name: expected a weight-normed parameter, got {name!r}, which is not")
    stacked = [] if kind == TORCH_HOOK else stacked_in(parametrizations_of(module, name))
    if len(stacked) > 1:
        got = ", ".join(type(p).__name__ for p in stacked)
        raise RuntimeError(
            f"name: expected weight norm alone on {name!r}, got {got}; "
            "parametrize.remove_parametrizations folds them all"
        )
    if pruned := pruned_original(module, name):
        raise RuntimeError(
            f"name: expected weight norm alone on {name!r}, got one of which {pruned!r} is pruned; "
            f"call torch.nn.utils.prune.remove(layer, {pruned!r}) before"
        )
    make_plain(module, name, folded_weight(module, name))
    return module


def folded_weight(module: nn.Module, name: str) -> nn.Parameter:
    """The plain Parameter that would replace a weight-normed one, computed with all
    parametrizations that are stacked on the weight norm. The module does not change."""
    if weight_norm_kind(module, name) == TORCH_HOOK:
        sources = [getattr(module, key) for key in legacy_keys(name)]
        with torch.no_grad():
            w = legacy_hooks(module)[name][1].compute_weight(module)
    else:
        weights = parametrizations_of(module, name)
        sources = list(weights.parameters())
        with torch.no_grad(), _eval_mode(weights):  # else spectral norm would iterate
            w = nn.Module.__call__(weights)  # weights() may give the tensor of a group
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
    """Replace a weight-normed parameter by a plain one."""
    if weight_norm_kind(module, name) == TORCH_HOOK:
        del module._forward_pre_hooks[legacy_hooks(module)[name][0]]
        for attribute in legacy_keys(name):
            delattr(module, attribute)
        vars(module).pop(name, None)  # it holds w of the last forward
    else:
        weights = parametrizations_of(module, name)
        stop_watching(weights)
        if isinstance(weights, WeightNormList):
            weights.owner = None
        weights.eval()  # torch computes the weight once more
        own_class(module)
        forget_legacy_names(module, name)
        remove_parametrizations(module, name)
    unregister_load_hook(module, name)
    take_removal_hook(module, name)
    setattr(module, name, weight)
