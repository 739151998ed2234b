"""Conversion from one key layout to another, of a dict without a model."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from .. import functional
from ..keys import FOLDED, LAYOUTS, PARAMETRIZED, pair_keys
from ..problem import WHOLE_TENSOR, check_eps
from ..splitting import split_for_torch, split_weight
from .agreement import contradiction, difference, identity
from .normed import Like, NormedWeight, find_normed_weights, is_float, weights_of

T = TypeVar("T")


def convert_state_dict(
    state_dict: Mapping[str, Any],
    to: str = PARAMETRIZED,
    *,
    like: nn.Module | Mapping[str, Any] | None = None,
    eps: float = 0.0,
) -> dict[str, Any]:
    """Convert the weight norms of a state dict to another key layout.

    ========================  ============================================================
    ``to``                    keys of a weight
    ========================  ============================================================
    ``"parametrized"``        ``parametrizations.weight.original0`` (g), ``original1`` (v)
    ``"legacy"``              ``weight_g``, ``weight_v``
    ``"folded"``              ``weight``, computed as the layers compute it
    ========================  ============================================================

    No model is needed: a weight norm is a pair of keys with floating-point tensors whose shapes fit
    g and v for some dim. Everything else stays unchanged: other entries, the order of keys,
    ``_metadata``, and the tensors themselves, which are not copied (tied tensors stay tied). The
    argument does not change. These entries are not converted, because a dict does not show what
    they are:

    - parametrized pairs with other parametrizations stacked on them, if those have keys, or whose g
      or v is parametrized itself;
    - ``x_g`` and ``x_v`` where g, or each row of v, has one element, unless "weight" is in the
      name: many models have unrelated parameters of such names and shapes;
    - an ``x_g`` or ``x_v`` without the other, as in one shard of a checkpoint, and entries of
      nested dicts.

    Layers of this package load all layouts by themselves. Convert the dict first where no load
    hooks run, as in ``from_pretrained`` of transformers 5::

        state_dict = convert_state_dict(load_file(path), like=Model(config))
        model = Model.from_pretrained(None, config=config, state_dict=state_dict)

    Args:
        state_dict: a dict of tensors, in any mixture of layouts, and of any other entries.
        to: the layout of the result.
        like: a module with weight norm, or its state dict. A folded weight does not show that it
            was normed, and stays folded unless it is weight-normed in ``like``: then it becomes v,
            and its norms become g. Pairs that are otherwise not converted are converted if ``like``
            has them. A weight that a module ``like`` does not compute from g and v alone is not
            converted: one with a subclass of a weight norm, with a parametrization that is none, or
            with other parametrizations on the weight norm, on g or on v. The dict may have only
            some of the layers of ``like``, normed or not. A dict that has no key of ``like`` is
            refused, because its keys must have other prefixes.
        eps: the lower bound of the norms in the layers; only folded weights depend on it. 0 means
            the bounds of the layers of ``like`` if that is a module, else no bound.

    Returns:
        A new dict; an OrderedDict if ``state_dict`` is one.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if the layout is unknown, a parametrized pair is incomplete, two layouts of a
            weight disagree, an entry is in the way of a new one, a plain weight has another shape
            than in ``like``, or ``like`` has weight norms but no key, in any layout, that is in the
            dict.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: expected a dict, got {type(state_dict).__name__}")
    if to not in LAYOUTS:
        expected = ", ".join(repr(layout) for layout in LAYOUTS)
        raise ValueError(f"to: expected one of {expected}, got {to!r}")
    known = weights_of(like)
    known.check_related(state_dict)
    found = find_normed_weights(state_dict, known.weights)
    weights = [weight for weight in found if weight.key not in known.others]
    conversion = _Conversion(state_dict, to, check_eps(eps), known)
    for weight in weights:
        conversion.convert_pair(weight)
    if to != FOLDED:
        paired = {weight.key for weight in weights}
        for key in state_dict.keys() & known.weights.keys() - paired:
            conversion.split(known.weights[key])
    return conversion.result()


def convert_found(
    state_dict: Mapping[str, Any], found: Iterable[NormedWeight], to: str, eps: float = 0.0
) -> dict[str, Any]:
    """Convert the weights that :func:`find_normed_weights` has found, as :func:`convert_state_dict`
    does."""
    conversion = _Conversion(state_dict, to, eps, Like())
    for weight in found:
        conversion.convert_pair(weight)
    return conversion.result()


@dataclass
class _Conversion:
    state_dict: Mapping[str, Any]
    to: str
    eps: float
    like: Like
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """For the key of an entry: the new entries that replace it."""
    computed: dict[Any, Any] = field(default_factory=dict)
    """Computed tensors, by a key of the tensors that they come from, so that tied tensors stay
    tied."""

    def __post_init__(self) -> None:
        self.position = {key: k for k, key in enumerate(self.state_dict)}

    def convert_pair(self, weight: NormedWeight) -> None:
        g_key, v_key = weight.pairs[0]
        g, v = self.state_dict[g_key], self.state_dict[v_key]
        for other in weight.pairs[1:]:
            _refuse(difference(weight.pairs[0], other, self.state_dict))
        for pair in weight.pairs:
            self.changes |= {key: {} for key in pair}
        plain = self.state_dict.get(weight.key)
        if isinstance(plain, Tensor) and plain.is_floating_point() and plain.shape == v.shape:
            w = self._fold(g, v, weight)
            _refuse(contradiction(weight.key, plain, w, weight.pairs[0]))
            if self.to == FOLDED:
                return
            self.changes[weight.key] = {}
        if self.to == FOLDED:
            first = min(g_key, v_key, key=self.position.__getitem__)
            self.changes[first] = {weight.key: self._fold(g, v, weight)}
        else:
            new_g, new_v = pair_keys(weight.key, self.to)
            self.changes |= {g_key: {new_g: self._shaped(g, weight.key)}, v_key: {new_v: v}}

    def split(self, weight: NormedWeight) -> None:
        w = self.state_dict[weight.key]
        if not is_float(w) or w.shape != weight.shape:
            got = f"{w.dtype} {list(w.shape)}" if isinstance(w, Tensor) else type(w).__name__
            raise ValueError(
                f'state_dict: expected a floating-point "{weight.key}" of shape '
                f"{list(weight.shape)} (that in like), got {got}"
            )

        if weight.by_torch:
            split = partial(split_for_torch, dim=weight.dim)
        else:
            split = partial(split_weight, dim=weight.dim, eps=self._eps_of(weight))

        def pair() -> tuple[Tensor, Tensor]:
            plain = w.detach()
            g, v = split(plain)
            own_v = w if v is plain else _as_in(w, v, w.requires_grad)
            return _as_in(w, g, w.requires_grad), own_v

        key = (identity(w), split.func, *split.keywords.values())
        g, v = self._once(key, pair, w)
        new_g, new_v = pair_keys(weight.key, self.to)
        self.changes[weight.key] = {new_g: self._shaped(g, weight.key), new_v: v}

    def result(self) -> dict[str, Any]:
        ordered = isinstance(self.state_dict, OrderedDict)
        converted: Any = OrderedDict() if ordered else {}
        for key, t in self.state_dict.items():
            for new_key, new in self.changes.get(key, {key: t}).items():
                if new_key != key and new_key in self.state_dict and new_key not in self.changes:
                    raise ValueError(
                        f'state_dict: expected no "{new_key}" beside "{key}", which is to become '
                        "that, got one"
                    )
                converted[new_key] = new
        metadata = getattr(self.state_dict, "_metadata", None)
        if metadata is not None:  # loading with assign=True writes into it
            converted._metadata = copy.deepcopy(metadata)
        return converted

    def _fold(self, g: Tensor, v: Tensor, weight: NormedWeight) -> Tensor:
        eps = self._eps_of(weight)

        def compute() -> Tensor:
            norms = g.detach().to(v.device)
            if weight.dim == WHOLE_TENSOR:  # g may have shape (1, 1, ...)
                norms = norms.reshape(())
            w = functional.weight_norm(v.detach(), norms, weight.dim, eps=eps)
            return _as_in(v, w, g.requires_grad or v.requires_grad)

        return self._once((identity(g), identity(v), eps), compute, g, v)

    def _shaped(self, g: Tensor, key: str) -> Tensor:
        """g, in the shape that it has in ``like``: g may be 0-dimensional or of shape (1,) if it
        has the one norm of a whole tensor."""
        known = self.like.weights.get(key)
        either = ((), (1,))
        if known is None or g.shape not in either or known.g_shape not in either:
            return g
        if g.shape == known.g_shape:
            return g
        return _as_in(g, g.detach().reshape(known.g_shape), g.requires_grad)

    def _eps_of(self, weight: NormedWeight) -> float:
        return self.eps or self.like.eps.get(weight.key, 0.0)

    def _once(self, key: Any, compute: Callable[[], T], *sources: Tensor) -> T:
        """The result for a key. The tensors that it was computed from are kept with it: a mapping
        may make tensors when they are asked for, and the next one could get the same memory."""
        if key not in self.computed:
            self.computed[key] = compute(), sources
        result: T = self.computed[key][0]
        return result


def _refuse(wrong: str | None) -> None:
    if wrong is not None:
        raise ValueError(f"state_dict: {wrong}")


def _as_in(source: Tensor, t: Tensor, requires_grad: bool) -> Tensor:
    """``t``, as a Parameter if ``source`` is one, as in ``state_dict(keep_vars=True)``."""
    return nn.Parameter(t, requires_grad) if isinstance(source, nn.Parameter) else t
