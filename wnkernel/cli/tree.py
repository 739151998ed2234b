"""Training checkpoints: state dicts somewhere in dicts and lists, beside anything else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..checkpoint.layouts import FOLDED
from .errors import BadInput
from .layouts import Change, Conversion


class Tree:
    """A checkpoint as it was loaded, to be converted in place as far as that is possible."""

    def __init__(self, conversion: Conversion) -> None:
        self._conversion = conversion
        self._seen: dict[int, tuple[object, object]] = {}
        self._optimizers: list[tuple[str, dict[str, Any]]] = []
        self._converted: list[tuple[dict[Any, Any], list[Change]]] = []

    def convert(self, root: object) -> object:
        """Convert every state dict in ``root``.

        Raises:
            BadInput: one of them contradicts itself.
        """
        try:
            return self._visit(root, "")
        except RecursionError:
            raise BadInput(f"{self._conversion.file}: nested too deeply") from None

    def warnings(self) -> list[str]:
        """What was kept as it is and may not fit any more."""
        if not self._conversion.changes:
            return []
        return [
            f"{where or 'optimizer state'}: kept as it is, {why}"
            for where, state in self._optimizers
            if (why := self._misfit(state))
        ]

    def _misfit(self, optimizer: dict[str, Any]) -> str | None:
        parameters = _parameters(optimizer)
        if any(isinstance(p, str) for p in parameters):
            return "with the names that the parameters had before"
        if self._conversion.to == FOLDED:
            return (
                f"but its {len(parameters)} parameters go by their order, and folding makes one "
                "of two: it does not fit any more"
            )
        for state_dict, changes in self._converted:
            outer = _with_modules_inside(state_dict)
            for change in changes:
                if change.weight.rpartition(".")[0] in outer:
                    return (
                        "but it goes by the order of parameters, which changes where a "
                        f"weight-normed module has others inside ({change.weight}): it may not fit "
                        "any more"
                    )
        return None

    def _visit(self, node: object, where: str) -> object:
        if not isinstance(node, (dict, list, tuple)):
            return node
        if id(node) in self._seen:  # in several places, or inside itself
            return self._seen[id(node)][1]
        self._seen[id(node)] = (node, node)
        visit = self._visit_dict if isinstance(node, dict) else self._visit_items
        new = visit(node, where)
        self._seen[id(node)] = (node, new)  # with the node, so that nothing else gets its id
        return new

    def _visit_dict(self, node: dict[Any, Any], where: str) -> dict[Any, Any]:
        if _is_optimizer(node):
            self._optimizers.append((where, node))
            return node
        for key, value in node.items():
            node[key] = self._visit(value, f"{where}.{key}" if where else str(key))
        if not _is_state_dict(node):
            return node
        self._conversion.check_kinds(node, where)
        before = len(self._conversion.changes)
        converted = self._conversion.convert(node, where)
        changes = self._conversion.changes[before:]
        self._converted.append((node, changes))
        return converted if changes else node

    def _visit_items(self, node: list[Any] | tuple[Any, ...], where: str) -> object:
        items = [self._visit(item, f"{where}[{i}]") for i, item in enumerate(node)]
        if isinstance(node, list):
            node[:] = items
            return node
        changed = any(a is not b for a, b in zip(items, node, strict=True))
        return tuple(items) if changed else node


def state_dicts(root: object) -> Iterator[dict[str, Any]]:
    """What :class:`Tree` would convert, as it is."""
    nodes, seen = [root], set()
    while nodes:
        node = nodes.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, (list, tuple)):
            nodes += node
        elif isinstance(node, dict) and not _is_optimizer(node):
            nodes += node.values()
            if _is_state_dict(node):
                yield node


def _is_optimizer(node: dict[Any, Any]) -> bool:
    return "state" in node and isinstance(node.get("param_groups"), list)


def _is_state_dict(node: dict[Any, Any]) -> bool:
    return any(isinstance(key, str) and isinstance(t, Tensor) for key, t in node.items())


def _parameters(optimizer: dict[str, Any]) -> list[Any]:
    groups = (g for g in optimizer["param_groups"] if isinstance(g, dict))
    return [p for group in groups for p in group.get("params", ())]


def _with_modules_inside(state_dict: dict[Any, Any]) -> set[str]:
    """The modules that have others inside. torch counts a module's own parameters before those
    inside, and parametrized ones are inside, after all others."""
    found = set()
    for key in filter(lambda key: isinstance(key, str), state_dict):
        parts = key.split(".")
        for depth, part in enumerate(parts[:-1]):
            if part != "parametrizations":
                found.add(".".join(parts[:depth]))
    return found
