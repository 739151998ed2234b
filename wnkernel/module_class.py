"""The class of a module with a weight norm of this package.

``torch.nn.utils.parametrize`` gives a module a class of its own, which has a property for every
parametrized tensor. This file changes what such a class does:

- ``module.weight`` is read without the detours of ``nn.Module.__getattr__``;
- ``module.weight = w`` sets g and v for a tensor and for a Parameter, and ``module.weight_v`` is
  known where a layer answers to legacy names;
- ``type(module)(...)`` makes a plain module;
- modules can be pickled, and RNNs copied after a forward.

A class may stand on another of these: that of what ``type(module)(...)`` made and was normed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .checkpoint import WeightNormOriginals, stacked_in, unregister_load_hook
from .checkpoint.loading import loads_for
from .legacy_names import (
    answer_to_legacy_names,
    forget_legacy_names,
    has_legacy_names,
    register_by_legacy_name,
)
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
    setattr(cls, name, property(_reader(name), _writer(name)))
    if vars(cls).get("register_parameter") is _register_parameter:
        return
    cls.register_parameter = _register_parameter
    cls.register_buffer = _register_buffer
    for attribute, question in QUESTIONS.items():
        setattr(cls, attribute, question)
    cls.__new__ = staticmethod(_new)
    cls.__reduce_ex__ = _reduce
    cls.__deepcopy__ = _deepcopy_by(cls.__deepcopy__)


def _reader(name: str) -> Callable[[nn.Module], Tensor]:
    """How the weight is read. torch's property is let go of: it holds on to the module that it was
    made for, which then waits for the garbage collector, and so does each of its copies."""

    def read(self: nn.Module) -> Tensor:
        try:
            weights = self._modules["parametrizations"]._modules[name]
        except KeyError:  # type(module)(...) is being made, or a removal is under way
            raise AttributeError(name) from None
        if parametrize._cache_enabled:
            return _read_cached(self, name)
        return weights()

    return read


def _writer(name: str) -> Callable[[nn.Module, Tensor], None]:
    def write(self: nn.Module, value: Tensor) -> None:
        _assign(self, name, value)

    return write


def _read_cached(module: nn.Module, name: str) -> Tensor:
    """Within ``parametrize.cached()``. torch's keys are made of the identities of modules, and a
    copy that was deleted leaves its identity to the next one."""
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError("Cannot trace a model while caching parametrizations.")  # as torch does
    key = (module, name)
    if key not in parametrize._cache:
        parametrize._cache[key] = module.parametrizations[name]()
    return parametrize._cache[key]


def forget_cached(module: nn.Module, name: str) -> None:
    """Let the next read within ``parametrize.cached()`` compute the weight anew."""
    parametrize._cache.pop((module, name), None)


def _register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
    if register_by_legacy_name(self, name, param):
        return
    if isinstance(name, str) and name.startswith("parametrizations."):
        _refuse(self, name, param)
    if param is not None and parametrize.is_parametrized(self, name):
        if type(param) is not nn.Parameter:
            _refuse(self, name, param)
        _assign(self, name, param)
        if not param.requires_grad:
            self.parametrizations[name].requires_grad_(False)
        return
    _next(self, "register_parameter")(name, param)
    _forget(self, name)


def _register_buffer(self: nn.Module, name: str, *args: Any, **kwargs: Any) -> None:
    _next(self, "register_buffer")(name, *args, **kwargs)
    _forget(self, name)


@torch.inference_mode(False)
def _assign(module: nn.Module, name: str, value: Tensor) -> None:
    """What ``module.weight = value`` means: g and v that give this weight. They stay the Parameters
    that they are, so optimizers go on. A frozen Parameter freezes them."""
    weights = module.parametrizations[name]
    if not isinstance(weights, WeightNormOriginals):  # spectral norm alone, say
        weights.right_inverse(value)
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    v = weights.original1
    expected, got = ((tuple(t.shape), t.dtype, t.device) for t in (v, value))
    if expected != got and len(stacked_in(weights)) == 1:  # what is stacked may change the shape
        raise ValueError(
            f"{name}: expected a weight like the one of this {type(module).__name__}, "
            f"{_words(expected)}, got {_words(got)}; one of another kind can take its place after "
            "wnkernel.remove_weight_norm(layer)"
        )
    weights.right_inverse(value.detach())


def _words(facts: tuple[tuple[int, ...], torch.dtype, torch.device]) -> str:
    shape, dtype, device = facts
    return f"{dtype} of shape {shape} on {device}"


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
        forget_legacy_names(module, name)


def _last_of_ours(cls: type[nn.Module]) -> type[nn.Module]:
    """The last class in the order of resolution that :func:`adopt_class` changed."""
    ours = (c for c in cls.__mro__ if vars(c).get("register_parameter") is _register_parameter)
    return list(ours)[-1]


def _next(module: nn.Module, method: str) -> Callable[..., Any]:
    """The method that ours stands before."""
    return getattr(super(_last_of_ours(type(module)), module), method)


def _new(cls: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """A plain module for ``type(module)(4, 2, 1)``. One of this class would have no weight norm
    either, but a property in the place of its weight, which torch.compile stumbles over. Copies are
    made of an empty one, for which there are no arguments."""
    base = _last_of_ours(cls).__bases__[0]
    return base(*args, **kwargs) if args or kwargs else base.__new__(cls)


def _deepcopy_by(
    of_torch: Callable[[nn.Module, dict[int, Any]], nn.Module],
) -> Callable[[nn.Module, dict[int, Any]], nn.Module]:
    """As parametrize's or the module's own, but the copy has a class of its own, and an RNN may
    have run: it holds the weights of its last forward, and deepcopy refuses tensors with a
    history."""

    def deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        for w in getattr(self, "_flat_weights", ()):
            if isinstance(w, Tensor) and not w.is_leaf:
                memo[id(w)] = w.detach().clone()
        copied = of_torch(self, memo)
        if type(copied) is type(self):
            own_class(copied)
        return copied

    return deepcopy


def _reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    """How a module is pickled: its class, which nobody can import, as what it is made from."""
    if vars(type(self)).get("__reduce_ex__") is not _reduce:  # others changed its class after us
        return object.__reduce_ex__(self, protocol)
    ours = _last_of_ours(type(self))
    getstate = getattr(super(ours, self), "__getstate__", None)  # object has one since Python 3.11
    state = dict(vars(self)) if getstate is None else getstate()
    if isinstance(self, nn.RNNBase):  # weights of its last forward, with their history
        state["_flat_weights"] = [
            w.detach() if isinstance(w, Tensor) and not w.is_leaf else w
            for w in state["_flat_weights"]
        ]
    lists = self.parametrizations if parametrize.is_parametrized(self) else {}
    normed = [name for name in lists if isinstance(lists[name], WeightNormOriginals)]
    legacy = [name for name in lists if has_legacy_names(self, name)]
    return _unpickled, (ours.__bases__[0], list(lists), normed, legacy), state


def _unpickled(
    base: type[nn.Module], names: Sequence[str], normed: Sequence[str], legacy: Sequence[str]
) -> nn.Module:
    """A module without a state, of a class as that of the one that was pickled."""
    module = base.__new__(base)
    if names:
        parametrize._inject_new_class(module)
    for name in names:
        if name in normed:
            adopt_class(module, name)
        else:
            parametrize._inject_property(module, name)
    for name in legacy:
        answer_to_legacy_names(module, name)
    return module
