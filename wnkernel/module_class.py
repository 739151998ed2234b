"""The class of a module with a weight norm of this package.

``torch.nn.utils.parametrize`` gives a module a class of its own, which has a property for every
parametrized tensor. This file changes what such a class does:

- ``module.weight`` is read without the detours of ``nn.Module.__getattr__``;
- ``module.weight = nn.Parameter(...)`` sets g and v, and ``module.weight_v`` is known where a layer
  answers to legacy names;
- ``type(module)(...)`` makes a plain module;
- modules can be pickled, and RNNs copied after a forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .checkpoint import WeightNormOriginals, unregister_load_hook
from .checkpoint.loading import loads_for
from .legacy_names import answer_to_legacy_names, has_legacy_names, register_by_legacy_name
from .plain_weights import QUESTIONS
from .removal import take_removal_hook


def own_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own.

    Copies made by deepcopy share the class that parametrize made, and (un)parametrizing one more
    parameter changes properties of that class: the copies would lose their weights.
    """
    cls = type(module)
    members = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(cls)(cls.__name__, cls.__bases__, members)


def adopt_class(module: nn.Module, name: str) -> None:
    """Change the class of a parametrized module, for a weight norm on one of its parameters."""
    cls = type(module)
    of_torch = getattr(cls, name)
    setattr(cls, name, property(_reader(name, of_torch.fget), of_torch.fset))
    if vars(cls).get("register_parameter") is _register_parameter:
        return
    cls.register_parameter = _register_parameter
    cls.register_buffer = _register_buffer
    for attribute, question in QUESTIONS.items():
        setattr(cls, attribute, question)
    cls.__new__ = staticmethod(_new)
    cls.__reduce_ex__ = _reduce
    if "__deepcopy__" in vars(cls):
        cls.__deepcopy__ = _deepcopy_by(cls.__deepcopy__)


def _reader(name: str, of_torch: Callable[[nn.Module], Tensor]) -> Callable[[nn.Module], Tensor]:
    def read(self: nn.Module) -> Tensor:
        try:
            weights = self._modules["parametrizations"]._modules[name]
        except KeyError:  # type(module)(...) is being made, or a removal is under way
            raise AttributeError(name) from None
        if parametrize._cache_enabled:
            return _read_cached(self, name, of_torch)
        return weights()

    return read


def _read_cached(module: nn.Module, name: str, of_torch: Callable[[nn.Module], Tensor]) -> Tensor:
    """Within ``parametrize.cached()``. torch's property goes by the module that it was made for,
    and would serve its weight to the copies of that module."""
    if torch._C._get_tracing_state() is not None:
        return of_torch(module)  # says that this cannot be traced
    key = (id(module), name)
    if key not in parametrize._cache:
        parametrize._cache[key] = module.parametrizations[name]()
    return parametrize._cache[key]


def _register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
    if register_by_legacy_name(self, name, param):
        return
    if isinstance(name, str) and name.startswith("parametrizations."):
        _refuse(self, name, param)
    if param is not None and parametrize.is_parametrized(self, name):
        _assign(self, name, param)
        return
    _next(self, "register_parameter", _register_parameter)(name, param)
    _forget(self, name)


def _register_buffer(self: nn.Module, name: str, *args: Any, **kwargs: Any) -> None:
    _next(self, "register_buffer", _register_buffer)(name, *args, **kwargs)
    _forget(self, name)


def _assign(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """What ``module.weight = nn.Parameter(...)`` means: g and v that give this weight. They stay
    the Parameters that they are, so optimizers go on; a frozen weight freezes them."""
    if type(parameter) is not nn.Parameter:
        _refuse(module, name, parameter)
    module.parametrizations[name].right_inverse(parameter.detach())
    if not parameter.requires_grad:
        module.parametrizations[name].requires_grad_(False)


def _refuse(module: nn.Module, name: str, parameter: object) -> None:
    kind = type(parameter.data if type(parameter) is nn.Parameter else parameter).__name__
    raise RuntimeError(
        f"{name}: expected a plain torch.nn.Parameter for a {type(module).__name__} with weight "
        f"norm, got one of type {kind}; sharding, quantization and the like need plain weights: "
        "call wnkernel.fold(model) before"
    )


def _forget(module: nn.Module, name: str) -> None:
    """Take away what a weight norm leaves behind that torch's ``remove_parametrizations`` removed:
    the last thing that this does is to register the plain weight."""
    hooks = module.__dict__.get("_load_state_dict_pre_hooks")
    if not hooks or parametrize.is_parametrized(module, name):
        return
    if any(loads_for(wrapped.hook) == name for wrapped in hooks.values()):
        unregister_load_hook(module, name)
        take_removal_hook(module, name)


def _next(module: nn.Module, method: str, ours: Callable[..., Any]) -> Callable[..., Any]:
    """The method that ours stands before, in whichever class of the module ours is."""
    cls = next(c for c in type(module).__mro__ if vars(c).get(method) is ours)
    return getattr(super(cls, module), method)


def _new(cls: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """A plain module for ``type(module)(4, 2, 1)``. One of this class would have no weight norm
    either, but a property in the place of its weight, which torch.compile stumbles over. Copies are
    made of an empty one, for which there are no arguments."""
    base = next(c for c in cls.__mro__ if "__new__" in vars(c) and c.__new__ is _new).__bases__[0]
    return base(*args, **kwargs) if args or kwargs else base.__new__(cls)


def _deepcopy_by(
    of_torch: Callable[[nn.Module, dict[int, Any]], nn.Module],
) -> Callable[[nn.Module, dict[int, Any]], nn.Module]:
    """As parametrize's, but the copy has a class of its own, and an RNN may have run: it holds the
    weights of its last forward, and deepcopy refuses tensors with a history."""

    def deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        for w in getattr(self, "_flat_weights", ()):
            if isinstance(w, Tensor) and not w.is_leaf:
                memo[id(w)] = w.detach().clone()
        copied = of_torch(self, memo)
        own_class(copied)
        return copied

    return deepcopy


def _reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    """How a module is pickled: its class, which nobody can import, as what it is made from."""
    cls = next(c for c in type(self).__mro__ if vars(c).get("__reduce_ex__") is _reduce)
    getstate = getattr(super(cls, self), "__getstate__", None)  # object has one since Python 3.11
    state = dict(vars(self)) if getstate is None else getstate()
    if isinstance(self, nn.RNNBase):  # weights of its last forward, with their history
        state["_flat_weights"] = [
            w.detach() if isinstance(w, Tensor) and not w.is_leaf else w
            for w in state["_flat_weights"]
        ]
    names = list(self.parametrizations)
    normed = [n for n in names if isinstance(self.parametrizations[n], WeightNormOriginals)]
    legacy = [n for n in names if has_legacy_names(self, n)]
    return _unpickled, (cls.__bases__[0], names, normed, legacy), state


def _unpickled(
    base: type[nn.Module], names: Sequence[str], normed: Sequence[str], legacy: Sequence[str]
) -> nn.Module:
    """A module without a state, of a class as that of the one that was pickled."""
    module = base.__new__(base)
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)
    for name in normed:
        adopt_class(module, name)
    for name in legacy:
        answer_to_legacy_names(module, name)
    return module
