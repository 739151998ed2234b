"""The g and v that a state dict holds for one layer, in any layout: they are found, checked, and
loaded both or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..keys import LEGACY, PARAMETRIZED, pair_keys
from ..observers import is_distributed
from .agreement import Pair, contradiction, difference, half


class LayoutError(ValueError):
    """The error for a state dict from which g and v of a layer cannot be told."""

    def __init__(self, message: str) -> None:
        super().__init__(f"{message}; the layer is unchanged")


Place = tuple[nn.Module, str, Tensor]
"""A module, the name of one of its parameters or buffers, and the tensor to load there."""


@dataclass(frozen=True)
class Target:
    """A weight-normed parameter that is about to be loaded."""

    g: Tensor
    v: Tensor
    split: Callable[[Tensor], tuple[Tensor, Tensor]]
    """A function that splits a plain weight into g and v."""
    compose: Callable[[Tensor, Tensor], Tensor] | None
    """A function that computes the plain weight from g and v. It is None if it is not known how the
    layer does this."""


@dataclass(frozen=True)
class Source:
    """Where a state dict may hold the weight of a layer."""

    state_dict: Mapping[str, Any]
    layer: str
    """The name of the weight in error messages."""
    pairs: tuple[Pair, ...]
    """The keys of g and v in each layout."""
    plain: str | None = None
    """The key of the plain weight."""

    def keys(self) -> list[str]:
        """All of these keys that the dict has."""
        keys = (*sum(self.pairs, ()), self.plain)
        return [key for key in keys if key is not None and key in self.state_dict]


def source(state_dict: Mapping[str, Any], prefix: str, name: str, *, legacy: bool = True) -> Source:
    """The keys of parameter ``name`` below ``prefix`` in all layouts; ``legacy=False`` leaves out
    the legacy layout."""
    key, layouts = prefix + name, (PARAMETRIZED, LEGACY) if legacy else (PARAMETRIZED,)
    return Source(state_dict, key, tuple(pair_keys(key, layout) for layout in layouts), key)


def g_and_v(source: Source, target: Target, *, assign: bool) -> tuple[Tensor, Tensor]:
    """The g and v to load, from a dict that has at least one of the keys.

    Raises:
        LayoutError: if half of a pair is missing, a tensor has the wrong shape or kind, or two
            layouts disagree.
    """
    layer, sd = source.layer, source.state_dict
    plain = source.plain if source.plain in sd else None
    for pair in source.pairs:
        _refuse(layer, half(pair, sd))
    pairs = [pair for pair in source.pairs if pair[0] in sd]
    for pair in pairs:
        _check_pair(layer, pair, sd, target)
    if plain is not None:
        _check_plain(layer, plain, sd[plain], target)
        if not pairs:
            return _split(layer, plain, sd[plain], target, assign)
    first, *others = pairs
    for other in others:
        _refuse(layer, difference(first, other, sd))
    g, v = (sd[key] for key in first)
    if plain is not None:
        try:
            wrong = contradiction(plain, sd[plain], _composed(g, v, target), first)
        except Exception as error:
            raise LayoutError(
                f'{layer}: expected one weight, got "{plain}" beside "{first[0]}" and '
                f'"{first[1]}", which cannot be computed ({error})'
            ) from error
        _refuse(layer, wrong)
    return g, v


def _refuse(layer: str, wrong: str | None) -> None:
    if wrong is not None:
        raise LayoutError(f"{layer}: {wrong}")


def _check_pair(
    layer: str,
    pair: Pair,
    state_dict: Mapping[str, Any],
    target: Target,
) -> None:
    for key in pair:
        _check_kind(layer, key, state_dict[key])
    g, v = (list(state_dict[key].shape) for key in pair)
    expected_g, expected_v = list(target.g.shape), list(target.v.shape)
    either: tuple[list[int], list[int]] = ([], [1])  # for one norm over all of v
    if v != expected_v or not (g == expected_g or (g in either and expected_g in either)):
        raise LayoutError(
            f"size mismatch for {layer}: expected g of shape {expected_g} and v of shape "
            f'{expected_v}, got {g} ("{pair[0]}") and {v} ("{pair[1]}")'
        )


def _check_plain(layer: str, key: str, weight: Any, target: Target) -> None:
    _check_kind(layer, key, weight)
    if is_distributed(weight) or is_distributed(target.v):
        raise LayoutError(
            f'{layer}: expected g and v, got the plain weight "{key}", which a sharded layer '
            "cannot split: load it before sharding, or convert the state dict with "
            "wnkernel.convert_state_dict(..., like=...)"
        )
    if weight.shape != target.v.shape:
        raise LayoutError(
            f"size mismatch for {layer}: expected a weight of shape {list(target.v.shape)}, got "
            f'{list(weight.shape)} ("{key}")'
        )


def _check_kind(layer: str, key: str, t: Any) -> None:
    if not isinstance(t, Tensor):
        raise LayoutError(f'{layer}: expected a tensor in "{key}", got {type(t).__name__}')
    kind = None
    if t.is_quantized:
        kind = "quantized"
    elif t.layout != torch.strided:
        kind = str(t.layout)
    elif not t.is_floating_point():
        kind = str(t.dtype)
    if kind:
        raise LayoutError(
            f'{layer}: expected a dense floating-point tensor in "{key}", got a {kind} one'
        )


@torch.inference_mode(False)  # the results may become parameters
@torch.no_grad()
def _split(
    layer: str, key: str, weight: Tensor, target: Target, assign: bool
) -> tuple[Tensor, Tensor]:
    if not assign:  # g holds the norms of v after its cast
        weight = weight.to(target.v.dtype)
    try:
        g, v = target.split(weight)
        wider = torch.promote_types(v.dtype, target.g.dtype)
        if not assign and wider != v.dtype:
            g, _ = target.split(weight.to(wider))
    except Exception as error:
        raise LayoutError(
            f'{layer}: expected g and v, got the plain weight "{key}", which cannot be split '
            f"({error})"
        ) from error
    return g, v


@torch.no_grad()
def _composed(g: Tensor, v: Tensor, target: Target) -> Tensor | None:
    """The plain weight of a g and a v; None if it is not known how the layer computes it."""
    if target.compose is None:
        return None
    return target.compose(g.to(v.device).reshape(target.g.shape), v)


def load_weight(
    where: Source,
    target: Target,
    places: Callable[[tuple[Tensor, Tensor]], Iterable[Place]],
    prefix: str,
    local_metadata: dict[str, Any],
    error_msgs: list[str],
) -> None:
    """Load g and v from the dict into their ``places``, whose keys begin with ``prefix``. Errors
    are appended to ``error_msgs``, as in torch."""
    assign = local_metadata.get("assign_to_params_buffers", False)
    try:
        pair = g_and_v(where, target, assign=assign)
    except LayoutError as error:
        error_msgs.append(str(error))
    else:
        with torch.inference_mode(False), torch.no_grad():  # places() may split g or v again
            found = list(places(pair))
        _load_all(found, prefix, local_metadata, error_msgs)


def _load_all(
    places: Sequence[Place],
    prefix: str,
    local_metadata: dict[str, Any],
    error_msgs: list[str],
) -> None:
    """Load both g and v, or neither if torch cannot load one of them."""
    before: list[tuple[nn.Module, str, Tensor, Tensor]] = []
    for module, name, t in places:
        own = getattr(module, name)
        content = own if len(before) == len(places) - 1 else own.detach().clone()
        if own.shape == (1,) and t.numel() == 1:  # torch cannot load a scalar into [1]
            t = t.detach().reshape(1)
        if not _load(module, name, t, prefix, local_metadata, error_msgs):
            break
        before.append((module, name, own, content))
    else:
        return
    for module, name, own, content in before:
        if getattr(module, name) is not own:
            setattr(module, name, own)
        with torch.no_grad():
            own.copy_(content)


def _load(
    module: nn.Module,
    name: str,
    t: Tensor,
    prefix: str,
    local_metadata: dict[str, Any],
    error_msgs: list[str],
) -> bool:
    """Load one parameter as torch does, but without the hooks of ``module``; returns whether it was
    loaded."""
    errors = len(error_msgs)
    holder = nn.Module()
    if name in module._buffers:
        holder.register_buffer(name, getattr(module, name))
    else:
        holder.register_parameter(name, getattr(module, name))
    holder._load_from_state_dict(
        {prefix + name: t}, prefix, local_metadata, False, [], [], error_msgs
    )
    if getattr(holder, name) is not getattr(module, name):
        setattr(module, name, getattr(holder, name))
    return len(error_msgs) == errors


def forget(keys: Iterable[str], unexpected_keys: list[str]) -> None:
    """Remove keys from the caller's list of unexpected keys."""
    unexpected_keys[:] = [key for key in unexpected_keys if key not in keys]
