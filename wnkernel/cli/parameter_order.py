"""Reorders data that depends on the order of parameters: the state of optimizers, and the lists of
tensors in which some EMAs keep their averages.

torch lists a module's own parameters first, and then those of its submodules. A legacy weight norm
adds g and v after the own parameters that the module has at that time; a parametrized one puts them
into a submodule. So the two layouts have different orders if a layer got a parameter after its
weight norm, or has submodules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.agreement import identity
from ..keys import PARAMETRIZED, weight_keys

STATISTICS = ("running_mean", "running_var")
"""The names of floating-point buffers of torch's batch and instance norms."""

MOST_NAMES = 8
"""The largest number of names that may be buffers for which all combinations are tried."""

MOST_DOTS = 1000
"""The largest number of dots in a key. torch cannot walk through modules that are nested deeper."""

Shapes = Sequence[Sequence[torch.Size]]
"""The shapes of all tensors that belong to a parameter, for each parameter."""

Names = tuple[str, ...]
"""The last parts of keys, such as ``weight``."""


class Doubt(Exception):
    """The file does not tell the order of the parameters in the other layout."""


class Order:
    """The order of the parameters of a state dict before and after its conversion.

    Args:
        converted: the state dict in the new layout, with its entries still in the old order.
        weights: the keys that the converted weights have when they are folded.
        to: the new layout.
    """

    def __init__(self, converted: Mapping[Any, Any], weights: Sequence[str], to: str) -> None:
        self._to = to
        self._homes = {k: w.rpartition(".")[0] for w in weights for k in weight_keys(w, to)}
        self._normed = set(self._homes.values())
        self._tensors = {
            key: t
            for key, t in converted.items()
            if isinstance(key, str)
            and isinstance(t, Tensor)
            and (t.is_floating_point() or t.is_complex())
            and _name(key) not in STATISTICS
        }
        self._moves: dict[Names, list[int]] = {}

    def is_kept(self) -> bool:
        """Return whether no parameter changes its place, no matter which entries are buffers."""
        if not self._homes:
            return True
        keys = list(self._tensors)
        try:
            return self._after(keys) == keys
        except Doubt:
            return False

    def moves(self, shapes: Shapes) -> list[list[int]]:
        """Return every possible new order of tensors, if they could belong to these parameters.

        Several orders are possible because a state dict does not tell which entries are buffers.

        Args:
            shapes: the shapes of the tensors that belong to each parameter, in the old order.

        Returns:
            For each possible order, the old places in the new order: ``[2, 0, 1]`` if the third
            parameter comes first. Empty if the tensors cannot belong to these parameters.

        Raises:
            Doubt: if the tensors could belong to these parameters, but their new order is unknown.
        """
        found: list[list[int]] = []
        for without, parameters in self._possible.get(len(shapes), ()):
            if _fit(shapes, parameters):
                if without not in self._moves:
                    self._moves[without] = self._move(self._keys(without))
                if (move := self._moves[without]) not in found:
                    found.append(move)
        return found

    def _move(self, keys: Sequence[str]) -> list[int]:
        after = self._parameters(self._after(keys))
        numbers = {self._same(key): number for number, key in enumerate(self._parameters(keys))}
        return [numbers[self._same(key)] for key in after]

    @cached_property
    def _possible(self) -> dict[int, list[tuple[Names, list[torch.Size]]]]:
        """The possible choices of buffers, by the number of parameters that each one leaves: the
        names of the buffers, and the shapes of the parameters."""
        names = {
            name
            for key in self._tensors
            if key not in self._homes and not _is_common(name := _name(key))
        }
        most = len(names) if len(names) <= MOST_NAMES else 0
        shapes = {key: t.shape for key, t in self._tensors.items()}
        possible: dict[int, list[tuple[Names, list[torch.Size]]]] = {}
        for count in range(most + 1):
            for without in combinations(sorted(names), count):
                left = [shapes[key] for key in self._parameters(self._keys(without))]
                possible.setdefault(len(left), []).append((without, left))
        return possible

    def _keys(self, without: Names) -> list[str]:
        return [key for key in self._tensors if _name(key) not in without]

    def _parameters(self, keys: Sequence[str]) -> list[str]:
        """Return the keys without those whose tensors are tied to earlier ones."""
        first = {self._same(key): key for key in reversed(keys)}
        return [key for key in keys if first[self._same(key)] == key]

    def _same(self, key: str) -> object:
        """Return a value that is equal for the keys of tied tensors, and for no others."""
        t = self._tensors[key]
        has_memory = t.layout == torch.strided and t.numel()
        return identity(t) if has_memory else key

    def _after(self, keys: Sequence[str]) -> list[str]:
        """Return the keys in the order of a model in the new layout, where g and v follow the last
        own parameter of their layer."""
        begin: dict[str, int] = {}
        last: dict[str, int] = {}
        outer: set[str] = set()  # modules with a weight norm that have submodules
        for position, key in enumerate(keys):
            if key.count(".") > MOST_DOTS:
                raise Doubt(f"a key has more than {MOST_DOTS} dots")
            module = self._homes.get(key, key.rpartition(".")[0])
            begin.setdefault(module, position)
            if key not in self._homes:
                last[module] = position
                self._check_own(module, key)
            while module:
                module = module.rpartition(".")[0]
                if module in self._normed:
                    begin.setdefault(module, position)
                    outer.add(module)
        if self._to == PARAMETRIZED and outer:
            raise Doubt(
                f'"{min(outer)}" has modules inside, whose parameters may come before those of its '
                "weight norm or after them"
            )

        def place(position: int) -> tuple[int, int, int]:
            module = self._homes.get(keys[position])
            if module is None:
                return position, 1, position
            if module in last:
                return last[module], 2, position
            return begin[module], 0, position

        return [keys[position] for position in sorted(range(len(keys)), key=place)]

    def _check_own(self, module: str, key: str) -> None:
        if self._to == PARAMETRIZED or module not in self._normed:
            return
        if not _is_common(_name(key)):
            raise Doubt(f'"{key}" may come before the weight norm of its layer or after it')


def _name(key: str) -> str:
    return key.rpartition(".")[2]


def _is_common(name: str) -> bool:
    """Return whether torch's own layers have parameters of such names. A layer has these before a
    weight norm is applied to it."""
    return "weight" in name or "bias" in name


def _fit(shapes: Shapes, parameters: Sequence[torch.Size]) -> bool:
    """Return whether tensors could belong to parameters: each tensor either has the shape of its
    parameter or is a scalar, such as a count of steps."""
    return len(shapes) == len(parameters) and all(
        shape in (parameter, ())
        for of_one, parameter in zip(shapes, parameters, strict=True)
        for shape in of_one
    )


def is_optimizer(node: dict[Any, Any]) -> bool:
    """Return whether a dict is the state of an optimizer."""
    return "state" in node and isinstance(node.get("param_groups"), list)


def numbered(optimizer: dict[str, Any]) -> list[Any]:
    """Return the numbers or names by which an optimizer refers to its parameters, in order."""
    groups = (group for group in optimizer["param_groups"] if isinstance(group, dict))
    lists = (group.get("params") for group in groups)
    return [p for params in lists if isinstance(params, (list, tuple)) for p in params]


def reordered_optimizer(state: dict[str, Any], orders: Sequence[Order]) -> dict[str, Any]:
    """Return the state of an optimizer in the new order of parameters, with the same entries.

    Raises:
        Doubt: if the order changes in a way that the file does not tell.
    """
    numbers, of_each, groups = numbered(state), state["state"], state["param_groups"]
    if not isinstance(of_each, dict) or not (of_each or len(groups) > 1):
        return state
    if not all(type(n) is int and n == i for i, n in enumerate(numbers)):
        raise Doubt("it does not number them from 0 on")
    entries = [of_each.get(number, {}) for number in numbers]
    shapes = [
        [t.shape for t in entry.values() if isinstance(t, Tensor)]
        for entry in entries
        if isinstance(entry, dict)
    ]
    move = _move(shapes, orders)
    if move == numbers:
        return state
    if len(groups) > 1:
        raise Doubt(f"it has them in {len(groups)} groups")
    moved = {new: of_each[old] for new, old in enumerate(move) if old in of_each}
    (group,) = groups
    if isinstance(names := group.get("param_names"), list) and len(names) == len(move):
        group = group | {"param_names": [names[old] for old in move]}
    return state | {"state": moved, "param_groups": [group]}


def reordered_tensors(tensors: list[Tensor], orders: Sequence[Order]) -> list[Tensor]:
    """Return a list of tensors in the new order of parameters, or unchanged if the tensors do not
    belong to parameters.

    Raises:
        Doubt: if the order changes in a way that the file does not tell.
    """
    shapes = [[t.shape] for t in tensors]
    try:
        return [tensors[old] for old in _move(shapes, orders)]
    except NoParameters:
        return tensors


class NoParameters(Doubt):
    """The tensors do not belong to the parameters of any model in the file."""


def _move(shapes: Shapes, orders: Sequence[Order]) -> list[int]:
    moves: list[list[int]] = []
    for order in orders:
        moves += (move for move in order.moves(shapes) if move not in moves)
    if not moves:
        raise NoParameters("the file has no model with such parameters and no others")
    if len(moves) > 1:
        raise Doubt("they may be of several models, or buffers")
    return moves[0]
