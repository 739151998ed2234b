"""The hook by which torch's removers find a weight norm of this package.

Packages ship their own ``remove_weight_norm()``. It calls :func:`torch.nn.utils.remove_weight_norm`
on every layer, or searches ``layer._forward_pre_hooks`` for torch's ``WeightNorm`` itself. Such
code works on layers of this package too, because each layer carries a hook of that type. The hook
does nothing in a forward, and :class:`HiddenHooks` hides it from its module.
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
    """A hook with the type and the name of torch's legacy weight norm. Its ``remove`` removes the
    weight norm of this package.

    Args:
        name: the name of the parameter.
        dim: the dim of the weight norm.
        remove: ``remove(module, name)`` removes the weight norm together with this hook.
    """

    def __init__(self, name: str, dim: int, remove: Callable[[nn.Module, str], Any]) -> None:
        super().__init__(name, dim)
        self._remove = remove

    def compute_weight(self, module: nn.Module) -> Tensor:
        """Return ``w``, as torch's hook does."""
        return getattr(module, self.name)

    def remove(self, module: nn.Module) -> None:
        """Remove the weight norm, but leave the hook in place, because callers remove it
        afterwards."""
        if not parametrize.is_parametrized(module, self.name):
            raise ValueError(f"weight_norm of '{self.name}' not found in {module}")
        keys = [k for k, hook in module._forward_pre_hooks.items() if hook is self]
        self._remove(module, self.name)
        module._forward_pre_hooks.update(dict.fromkeys(keys, self))

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """Do nothing, because ``module.weight`` is computed when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.name, self.dim, self._remove)


# Some packages compare these names, because their own `weight_norm` hides the module of the class.
RemovalHook.__module__ = LegacyHook.__module__
RemovalHook.__name__ = RemovalHook.__qualname__ = LegacyHook.__name__


def _unpickled(name: str, dim: int, remove: Callable[[nn.Module, str], Any]) -> RemovalHook:
    return RemovalHook(name, dim, remove)


class HiddenHooks(OrderedDict[int, Callable[..., Any]]):
    """The forward pre-hooks of a module, of which removal hooks do not count.

    The dict is false and has length 0 if it holds removal hooks only. So ``nn.Module.__call__``
    takes its short path, and CUDA graphs and fast paths of torch accept the module, although they
    refuse modules with hooks. Iteration gives all hooks.
    """

    @assume_constant_result  # before torch 2.7 Dynamo cannot iterate over a subclass of dict
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
    if len(hooks) == 0 and type(hooks) is not HiddenHooks:  # handles refer to their dict
        hooks = module._forward_pre_hooks = HiddenHooks()
    hooks[RemovableHandle(hooks).id] = hook


def take_removal_hook(module: nn.Module, name: str) -> None:
    """Undo :func:`add_removal_hook` if it was called."""
    hooks = module._forward_pre_hooks
    for key in [k for k, h in hooks.items() if type(h) is RemovalHook and h.name == name]:
        del hooks[key]
