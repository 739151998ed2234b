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
from torch.compiler import assume_constant_result
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
    """Hooks of a module, and its removal hooks, which do not count.

    It is false and has no length where there are no others: for ``nn.Module.__call__``, which takes
    a shorter way then, and for CUDA graphs and fast paths of torch that do not take modules with
    hooks. Whoever goes through the hooks finds all of them.
    """

    @assume_constant_result  # before torch 2.7 Dynamo cannot go through a subclass of dict
    def __bool__(self) -> bool:
        for hook in self.values():  # noqa: SIM110, any() takes twice as long
            if type(hook) is not RemovalHook:
                return True
        return False

    def __len__(self) -> int:
        return sum(type(hook) is not RemovalHook for hook in self.values())


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
