"""What torch's removers find on a layer of this package.

Packages ship their own ``remove_weight_norm()``. It calls :func:`torch.nn.utils.remove_weight_norm`
on every layer, or looks through ``layer._forward_pre_hooks`` for torch's ``WeightNorm`` itself.
Such code works on our layers too, because each of them carries a hook of that type. The hook does
nothing in a forward, and a module does not even notice it: see :class:`HiddenHooks`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
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
        way_back: ``way_back(module, name)`` removes the weight norm, and this hook with it.
    """

    def __init__(self, name: str, dim: int, way_back: Callable[[nn.Module, str], Any]) -> None:
        super().__init__(name, dim)
        self._way_back = way_back

    def compute_weight(self, module: nn.Module) -> Tensor:
        """``w``, as of torch's hook."""
        return getattr(module, self.name)

    def remove(self, module: nn.Module) -> None:
        """Remove the weight norm. Whoever calls this takes the hook away afterwards."""
        if not parametrize.is_parametrized(module, self.name):
            raise ValueError(f"weight_norm of '{self.name}' not found in {module}")
        key = next(k for k, hook in module._forward_pre_hooks.items() if hook is self)
        self._way_back(module, self.name)
        module._forward_pre_hooks[key] = self

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """Nothing: ``module.weight`` is computed when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.name, self.dim, self._way_back)


# Some packages compare these names, because their own `weight_norm` hides the module of the class.
RemovalHook.__module__ = LegacyHook.__module__
RemovalHook.__name__ = RemovalHook.__qualname__ = LegacyHook.__name__


def _unpickled(name: str, dim: int, way_back: Callable[[nn.Module, str], Any]) -> RemovalHook:
    return RemovalHook(name, dim, way_back)


class HiddenHooks(OrderedDict[int, Callable[..., Any]]):
    """Hooks of a module that count as none where all of them are removal hooks.

    ``nn.Module.__call__`` takes a shorter way if its dictionaries of hooks are false.
    """

    shows = False
    """Whether there are others: an attribute, because Dynamo of torch 2.4 knows no methods of such
    dictionaries."""

    def __bool__(self) -> bool:
        return self.shows

    def __setitem__(self, key: int, hook: Callable[..., Any]) -> None:
        super().__setitem__(key, hook)
        self._look()

    def __delitem__(self, key: int) -> None:
        super().__delitem__(key)
        self._look()

    def pop(self, *args: Any) -> Any:
        try:
            return super().pop(*args)
        finally:
            self._look()

    def popitem(self, last: bool = True) -> tuple[int, Callable[..., Any]]:
        try:
            return super().popitem(last)
        finally:
            self._look()

    def clear(self) -> None:
        super().clear()
        self._look()

    def _look(self) -> None:
        self.shows = any(type(hook) is not RemovalHook for hook in self.values())


def add_removal_hook(module: nn.Module, hook: RemovalHook) -> None:
    """Let torch's removers find a weight norm of this package."""
    take_removal_hook(module, hook.name)
    if len(module._forward_pre_hooks) == 0:  # else handles of other hooks hold on to the dictionary
        module._forward_pre_hooks = HiddenHooks()
    hooks = module._forward_pre_hooks
    hooks[RemovableHandle(hooks).id] = hook


def take_removal_hook(module: nn.Module, name: str) -> None:
    """Undo :func:`add_removal_hook`, if it was done."""
    hooks = module._forward_pre_hooks
    for key in [k for k, h in hooks.items() if type(h) is RemovalHook and h.name == name]:
        del hooks[key]
