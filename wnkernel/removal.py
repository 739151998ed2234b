"""What torch's removers find on a layer of this package.

Packages ship their own ``remove_weight_norm()``. It calls :func:`torch.nn.utils.remove_weight_norm`
on every layer, or looks through ``layer._forward_pre_hooks`` for torch's ``WeightNorm`` itself.
Such code works on our layers too, because each of them carries a hook of that type. The hook does
nothing in a forward, and a module does not even notice it: see :class:`HiddenHooks`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import (
    Callable,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    MutableMapping,
    ValuesView,
)
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.weight_norm import WeightNorm as LegacyHook
from torch.utils.hooks import RemovableHandle


class RemovalHook(LegacyHook):
    """A weight norm of torch's legacy kind by type and name, whose ``remove`` removes ours.

    Args:
        name: which parameter of the module.
        dim: that of the weight norm.
        remove: ``remove(module, name)`` removes the weight norm, and this hook with it.
    """

    def __init__(self, name: str, dim: int, remove: Callable[[nn.Module, str], Any]) -> None:
        super().__init__(name, dim)
        self._remove = remove

    def compute_weight(self, module: nn.Module) -> Tensor:
        """``w``, as of torch's hook."""
        return getattr(module, self.name)

    def remove(self, module: nn.Module) -> None:
        """Remove the weight norm. Whoever calls this takes the hook away afterwards."""
        if not parametrize.is_parametrized(module, self.name):
            raise ValueError(f"weight_norm of '{self.name}' not found in {module}")
        keys = [k for k, hook in module._forward_pre_hooks.items() if hook is self]
        self._remove(module, self.name)
        module._forward_pre_hooks.update(dict.fromkeys(keys, self))

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """Nothing: ``module.weight`` is computed when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.name, self.dim, self._remove)


# Some packages compare these names, because their own `weight_norm` hides the module of the class.
RemovalHook.__module__ = LegacyHook.__module__
RemovalHook.__name__ = RemovalHook.__qualname__ = LegacyHook.__name__


def _unpickled(name: str, dim: int, remove: Callable[[nn.Module, str], Any]) -> RemovalHook:
    return RemovalHook(name, dim, remove)


class HiddenHooks(OrderedDict[int, Callable[..., Any]]):
    """Hooks of a module, and its removal hooks, which only those find who look through them all.

    What it holds as a dictionary are the other hooks. So it is false and has no length where there
    are none, for ``nn.Module.__call__``, which takes a shorter way then, for compilers, and for
    CUDA graphs and fast paths of torch that do not take modules with hooks.
    """

    def __init__(self, hooks: Iterable[tuple[int, Callable[..., Any]]] = ()) -> None:
        self.every: dict[int, Callable[..., Any]] = {}
        """All hooks, in the order in which they are called. Never changed but replaced: packages
        remove weight norms while they go through the hooks."""
        self.shows = False
        """Whether there are others. It and ``every`` are attributes because Dynamo of torch 2.4
        does not follow ``super()`` into dictionaries."""
        super().__init__(hooks)

    def __bool__(self) -> bool:
        return self.shows

    def __iter__(self) -> Iterator[int]:
        return iter(self.every)

    def keys(self) -> KeysView[int]:
        return self.every.keys()

    def values(self) -> ValuesView[Callable[..., Any]]:
        return self.every.values()

    def items(self) -> ItemsView[int, Callable[..., Any]]:
        return self.every.items()

    def __contains__(self, key: object) -> bool:
        return key in self.every

    def __getitem__(self, key: int) -> Callable[..., Any]:
        return self.every[key]

    def __setitem__(self, key: int, hook: Callable[..., Any]) -> None:
        self.every = {**self.every, key: hook}
        if type(hook) is not RemovalHook:
            super().__setitem__(key, hook)
            self.shows = True

    def __delitem__(self, key: int) -> None:
        gone = self.every[key]
        self.every = {k: hook for k, hook in self.every.items() if k != key}
        if type(gone) is not RemovalHook:
            super().__delitem__(key)
            self.shows = len(self) > 0

    def move_to_end(self, key: int, last: bool = True) -> None:
        moved = {key: self.every[key]}
        others = {k: hook for k, hook in self.every.items() if k != key}
        self.every = {**others, **moved} if last else {**moved, **others}

    def popitem(self, last: bool = True) -> tuple[int, Callable[..., Any]]:
        for key in reversed([*self]) if last else self:
            return key, self.pop(key)
        raise KeyError("dictionary is empty")

    get, setdefault = MutableMapping.get, MutableMapping.setdefault
    pop, clear = MutableMapping.pop, MutableMapping.clear

    def __reduce__(self) -> tuple[Any, ...]:
        return HiddenHooks, (list(self.items()),)


def add_removal_hook(module: nn.Module, hook: RemovalHook) -> None:
    """Let torch's removers find a weight norm of this package."""
    take_removal_hook(module, hook.name)
    hooks = module._forward_pre_hooks
    if len(hooks) == 0 and type(hooks) is not HiddenHooks:  # handles of hooks hold on to theirs
        hooks = module._forward_pre_hooks = HiddenHooks()
    hooks[RemovableHandle(hooks).id] = hook


def take_removal_hook(module: nn.Module, name: str) -> None:
    """Undo :func:`add_removal_hook`, if it was done."""
    hooks = module._forward_pre_hooks
    for key in [k for k, h in hooks.items() if type(h) is RemovalHook and h.name == name]:
        del hooks[key]
