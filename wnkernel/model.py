"""``convert(model)`` and ``fold(model)``: the weight norms of a whole model at once."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .aliases import answer_to_legacy_names, pruned_original
from .census import (
    OURS,
    TORCH_HOOK,
    NormedParameter,
    census,
    is_known,
    legacy_hooks,
    normed_in,
    parametrizations_of,
)
from .checkpoint import unregister_load_hook
from .checkpoint.loading import load_hooks, loads_for
from .forced_layers import ForcedParameter, forced_in
from .grouping import scopes
from .grouping.group import WeightNormGroup
from .keys import G, V, legacy_keys
from .layers import folded_weight, make_ours, make_plain, register, update_flat_weights
from .lost_writes import end_watches
from .module_class import own_class, share_class
from .norm_module import WeightNorm
from .observers import sharding_modules
from .parametrization import WeightNormList
from .problem import check, check_module


@torch.inference_mode(False)
def convert(model: nn.Module) -> list[str]:
    """Turn torch's weight norms into weight norms of this package, in place: those of
    :func:`torch.nn.utils.weight_norm` (the legacy hook) and those of
    :func:`torch.nn.utils.parametrizations.weight_norm`.

    g and v stay the same Parameter objects, so optimizers, EMA and DistributedDataParallel keep
    working. The names of a layer with the legacy hook change, from ``weight_g`` and ``weight_v`` to
    ``parametrizations.weight.original0`` and ``.original1``; ``layer.weight_g`` still works, and
    checkpoints load with both spellings. docs/convert.md has the details.

    Subclasses of torch's two kinds are not converted. If the model was fused before, the converted
    layers join its group only if the group is removed and made again.

    Args:
        model: any module; it is searched with all modules inside it, shared layers once.

    Returns:
        The names of the converted weights; none if the model is converted already.

    Raises:
        TypeError: if ``model`` is not a torch.nn.Module.
        ValueError: if a weight norm cannot be converted. The model is unchanged then.
    """
    check_module("model", model)
    found = [e for e in census(model) if e.kind != OURS and is_known(e.norm)]
    _check(model, found)
    with _all_or_nothing(e.module for e in found):
        for e in reversed(found):  # each hook's list goes before the existing ones
            (_convert_hook if e.kind == TORCH_HOOK else _convert_parametrization)(e.module, e.name)
    for e in found:
        share_class(e.module)
    _forget_stale_hooks(model)
    return [e.path for e in found]


@torch.inference_mode(False)
def fold(model: nn.Module) -> list[str]:
    """Fold all weight norms of a model into plain parameters, in place: this package's, forced ones
    included, torch's parametrization and torch's legacy hook.

    The outputs of the model in eval mode keep their bits. A weight keeps its dtype and memory
    format, and requires grad if g or v did. Weights that shared their g and v become one Parameter.
    Parametrizations that are stacked on a weight norm, such as spectral norm, are folded with it,
    as in eval mode; parametrizations of other parameters stay. Groups of :func:`wnkernel.fuse` are
    removed. As with torch, the new parameters come last in their layer, and optimizers that hold g
    and v do not get them.

    Args:
        model: any module; it is searched with all modules inside it, shared layers once.

    Returns:
        The names of the folded weights; none if the model has no weight norm.

    Raises:
        TypeError: if ``model`` is not a torch.nn.Module.
        ValueError: if a weight norm cannot be computed, or is part of a sharded module or of a
            module in DistributedDataParallel. The model is unchanged then, and also if a
            parametrization that is stacked on a weight norm raises an error.
    """
    check_module("model", model)
    found = _outermost(census(model))
    forced = [e for path, m in model.named_modules() for e in forced_in(m, path)]
    _check(model, found)
    _refuse_shared(forced)
    _refuse_within(model, sharding_modules(), forced, _SHARDED)
    _refuse_within(
        model,
        (nn.parallel.DistributedDataParallel,),
        [*found, *forced],
        "wrapped in DistributedDataParallel, which holds g and v; fold its .module and wrap it "
        "again",
    )
    sources = [e.source() for e in found]
    plain: dict[Hashable, nn.Parameter] = {}
    for e, source in zip(found, sources, strict=True):
        if source not in plain:
            plain[source] = folded_weight(e.module, e.name)
    lists = (e.weights for e in found if e.kind == OURS)
    end_watches(weights for weights in lists if isinstance(weights, WeightNormList))
    _ungroup(model)
    for e, source in zip(found, sources, strict=True):
        make_plain(e.module, e.name, plain[source])
    for other in forced:
        other.fold()
    _forget_stale_hooks(model)
    return [e.path for e in found] + [other.path for other in forced]


def _outermost(found: list[NormedParameter]) -> list[NormedParameter]:
    """The weight norms in ``found`` without those that compute g or v of another weight norm, which
    are folded together with that one."""
    lists = {id(e.weights) for e in found if e.kind != TORCH_HOOK}
    return [e for e in found if id(e.module) not in lists]


def _refuse_shared(forced: list[ForcedParameter]) -> None:
    """Raise an error for forced weights that share their v, which can become one w only."""
    seen: set[int] = set()
    for e in forced:
        v = id(e.weights.terms().v)
        if v in seen:
            _refuse(e, "which shares its parameter with another one")
        seen.add(v)


_SHARDED = "part of a sharded module; do this first and shard it then"


def _check(model: nn.Module, found: Iterable[NormedParameter]) -> None:
    """Raise an error for a weight norm that can be neither converted nor folded."""
    _refuse_within(model, sharding_modules(), found, _SHARDED)
    for e in found:
        if e.kind == TORCH_HOOK:
            for key in legacy_keys(e.name):
                if e.module._parameters.get(key, e.module._buffers.get(key)) is None:
                    _refuse(
                        e,
                        f"without a parameter {key!r}; undo what computes that first, such as "
                        "with prune.remove or nn.utils.remove_spectral_norm",
                    )
        elif not e.is_first:
            _refuse(e, "on top of another parametrization")
        elif pruned := pruned_original(e.module, e.name):
            _refuse(e, f"of which {pruned!r} is pruned; call torch.nn.utils.prune.remove before")
        if is_known(e.norm):
            g, v = e.originals()
            try:
                check(v, g, e.norm.dim)
            except (TypeError, ValueError) as error:
                _refuse(e, f"with {error}", error)


def _refuse_within(
    model: nn.Module,
    wrappers: tuple[type, ...],
    found: Iterable[NormedParameter | ForcedParameter],
    why: str,
) -> None:
    units = [m for m in model.modules() if isinstance(m, wrappers)]
    within = {id(m) for unit in units for m in unit.modules()}
    for e in found:
        if id(e.module) in within:
            _refuse(e, why)


def _refuse(e: NormedParameter | ForcedParameter, why: str, cause: Exception | None = None) -> None:
    raise ValueError(
        f"model: expected weight norms that can be computed, got {e.path!r} ({e.kind}), {why}"
    ) from cause


@contextmanager
def _all_or_nothing(changed: Iterable[nn.Module]) -> Iterator[None]:
    """Put modules and their parametrizations back as they were if the block raises."""
    modules = {id(m): m for module in changed for m in (module, *_parametrizations(module))}
    before = []
    for module in modules.values():
        state = vars(module)
        found = [c for c in state.values() if isinstance(c, (dict, set, list))]
        before.append((module, type(module), dict(state), [(c, copy.copy(c)) for c in found]))
    try:
        yield
    except BaseException:
        for module, cls, state, containers in before:
            module.__class__ = cls
            vars(module).clear()
            vars(module).update(state)
            for container, content in containers:
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(content)
        raise


def _parametrizations(module: nn.Module) -> Iterator[nn.Module]:
    if parametrize.is_parametrized(module):
        yield from module.get_submodule("parametrizations").modules()


def _convert_parametrization(module: nn.Module, name: str) -> None:
    own_class(module)
    norm: Any = parametrizations_of(module, name)[0]
    norm.__class__ = WeightNorm  # in place, so that its hooks and all references to it stay
    norm.eps = 0.0
    make_ours(module, name)


class _Adopting(WeightNorm):
    """A weight norm that does not split a weight, because it gets existing g and v afterwards."""

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight, weight


def _convert_hook(module: nn.Module, name: str) -> None:
    number, hook = legacy_hooks(module)[name]
    del module._forward_pre_hooks[number]
    vars(module).pop(name, None)  # it holds w of the last forward
    had_parametrizations = parametrize.is_parametrized(module)

    _, v = (getattr(module, key) for key in legacy_keys(name))
    norm: WeightNorm = _Adopting(hook.dim)
    module.register_parameter(name, nn.Parameter(v.detach(), requires_grad=False))
    register(module, name, norm)
    norm.__class__ = WeightNorm
    lists, weights = module.get_submodule("parametrizations"), parametrizations_of(module, name)
    (weights if had_parametrizations else lists).train(module.training)
    for original, key in zip((G, V), legacy_keys(name), strict=True):
        delattr(weights, original)
        _move(module, key, weights, original)
    answer_to_legacy_names(module, name)

    # The list comes as early as it can, because g and v were parameters of the module itself.
    if had_parametrizations:
        _to_front(lists._modules, name)
    else:
        _to_front(module._modules, "parametrizations")
    update_flat_weights(module, name)


def _to_front(modules: dict[str, nn.Module | None], first: str) -> None:
    for key in [key for key in modules if key != first]:
        modules[key] = modules.pop(key)


def _move(source: nn.Module, key: str, target: nn.Module, name: str) -> None:
    """Move a parameter or buffer from one module to another."""
    if key in source._parameters:
        target.register_parameter(name, source._parameters.pop(key))
    else:
        persistent = key not in source._non_persistent_buffers_set
        target.register_buffer(name, source._buffers.pop(key), persistent)
        source._non_persistent_buffers_set.discard(key)


def _forget_stale_hooks(model: nn.Module) -> None:
    """Remove load hooks of weight norms that no longer exist. ``remove_parametrizations`` leaves
    torch's load hook behind, which would rename keys that a plain or legacy layer needs
    unchanged."""
    for module in model.modules():
        live = {name for name, e in normed_in(module).items() if e.kind != TORCH_HOOK}
        for hook in load_hooks(module).values():
            name = loads_for(hook)
            if name is not None and name not in live:
                unregister_load_hook(module, name)


def _ungroup(model: nn.Module) -> None:
    """Remove the groups of a model, and detach its modules from groups of modules around it."""
    for module in model.modules():
        container = scopes.container_of(module)
        if container is not None and container.is_root():
            WeightNormGroup.of(module).remove()
        scopes.detach(module)
