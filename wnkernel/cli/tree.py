"""Converts training checkpoints: nested dicts and lists with state dicts anywhere inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import Tensor

from ..keys import FOLDED
from .conversion import Conversion
from .errors import BadInput
from .parameter_order import (
    Doubt,
    Order,
    is_optimizer,
    numbered,
    reordered_optimizer,
    reordered_tensors,
)

T = TypeVar("T")

MOST_SHOWN = 400
"""The largest number of characters of a path in messages."""


class Tree:
    """Converts a loaded checkpoint. Dicts and lists are changed in place. State dicts with weight
    norms, and tuples with changed items, are replaced by new ones."""

    def __init__(self, conversion: Conversion) -> None:
        self._conversion = conversion
        self._seen: dict[int, tuple[object, object]] = {}
        self._optimizers: list[tuple[str, dict[str, Any]]] = []
        self._lists: list[tuple[str, list[Tensor]]] = []
        self._orders: list[Order] = []

    def convert(self, root: object) -> object:
        """Convert every state dict in ``root``, and reorder optimizer states and lists of tensors
        to match the new order of parameters.

        Raises:
            BadInput: if a state dict contradicts itself, or if the new order is unknown.
        """
        try:
            converted = self._visit(root, "")
        except RecursionError:
            raise BadInput(f"{self._conversion.file}: nested too deeply") from None
        if self._conversion.to != FOLDED and not all(order.is_kept() for order in self._orders):
            self._reorder()
        return converted

    def warnings(self) -> list[str]:
        """Return a warning for each optimizer state that was kept and may no longer fit."""
        if not self._conversion.changes:
            return []
        return [
            f"{where or 'optimizer state'}: kept as it is, {why}"
            for where, state in self._optimizers
            if (why := self._misfit(state))
        ]

    def _reorder(self) -> None:
        for where, optimizer in self._optimizers:
            if not _goes_by_names(optimizer):
                reordered = self._reordered(where, reordered_optimizer, optimizer)
                optimizer.update(reordered)
        for where, tensors in self._lists:
            in_order = self._reordered(where, reordered_tensors, tensors)
            tensors[:] = in_order

    def _reordered(self, where: str, reorder: Callable[[T, list[Order]], T], content: T) -> T:
        try:
            return reorder(content, self._orders)
        except Doubt as doubt:
            raise BadInput(
                f"{self._conversion.file}: {where or 'optimizer state'}: refused: it goes by the "
                f"order of parameters, which the conversion changes, and {doubt}; convert the file "
                "without it"
            ) from None

    def _misfit(self, optimizer: dict[str, Any]) -> str | None:
        if _goes_by_names(optimizer):
            return "with the names that the parameters had before"
        if self._conversion.to == FOLDED:
            return (
                f"but its {len(numbered(optimizer))} parameters go by their order, and folding "
                "makes one of two: it does not fit any more"
            )
        return None

    def _visit(self, node: object, where: str) -> object:
        if not isinstance(node, (dict, list, tuple)):
            return node
        if id(node) in self._seen:  # the node is in several places, or inside itself
            return self._seen[id(node)][1]
        self._seen[id(node)] = (node, node)
        if isinstance(node, dict):
            new: object = self._visit_dict(node, where)
        else:
            new = self._visit_items(node, where)
        self._seen[id(node)] = (node, new)  # keeps the node alive, so that no other gets its id
        return new

    def _visit_dict(self, node: dict[Any, Any], where: str) -> dict[Any, Any]:
        if is_optimizer(node):
            self._optimizers.append((where, node))
            return node
        for key, value in node.items():
            node[key] = self._visit(value, _short(f"{where}.{key}" if where else str(key)))
        if not _is_state_dict(node):
            return node
        found = self._conversion.check_kinds(node, where)
        before = len(self._conversion.changes)
        converted = self._conversion.convert(node, where, found=found)
        changes = self._conversion.changes[before:]
        weights = [change.weight for change in changes]
        self._orders.append(Order(converted, weights, self._conversion.to))
        return converted if changes else node

    def _visit_items(self, node: list[Any] | tuple[Any, ...], where: str) -> object:
        items = [self._visit(item, _short(f"{where}[{i}]")) for i, item in enumerate(node)]
        if isinstance(node, list):
            node[:] = items
            if node and all(isinstance(item, Tensor) for item in items):
                self._lists.append((where, node))
            return node
        changed = any(a is not b for a, b in zip(items, node, strict=True))
        return tuple(items) if changed else node


def _short(where: str) -> str:
    """Shorten a path for messages. Every level of a tree keeps its own path, so nested long keys
    would take much memory."""
    half = MOST_SHOWN // 2
    return where if len(where) <= MOST_SHOWN else f"{where[:half]}…{where[1 - half :]}"


def state_dicts(root: object) -> Iterator[dict[str, Any]]:
    """Yield the state dicts that :class:`Tree` would convert, without changing them."""
    nodes, seen = [root], set()
    while nodes:
        node = nodes.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, (list, tuple)):
            nodes += node
        elif isinstance(node, dict) and not is_optimizer(node):
            nodes += node.values()
            if _is_state_dict(node):
                yield node


def _is_state_dict(node: dict[Any, Any]) -> bool:
    return any(isinstance(key, str) and isinstance(t, Tensor) for key, t in node.items())


def _goes_by_names(optimizer: dict[str, Any]) -> bool:
    return any(isinstance(parameter, str) for parameter in numbered(optimizer))
