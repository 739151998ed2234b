"""The class of a module with a weight norm of this package.

``torch.nn.utils.parametrize`` gives a module a class of its own, which has a property for every
parametrized tensor. This file changes such a class:

- ``module.weight`` is read without the detours of ``nn.Module.__getattr__``;
- ``module.weight = w`` sets g and v for a tensor and for a Parameter, and ``module.weight_v``
  exists if the layer has legacy names;
- ``type(module)(...)`` makes a plain module, and has the signature of the plain class;
- modules can be pickled, and RNNs can be copied after a forward.

Modules share one class if their classes would be equal. A module gets a class of its own before its
class is changed.

Such a class may derive from another one, if a module of ``type(module)(...)`` is normed again.
"""

from __future__ import annotations

import inspect
from abc import ABCMeta
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .aliases import (
    answer_to_legacy_names,
    forget_legacy_names,
    has_legacy_names,
    register_by_legacy_name,
)
from .assigning import assign, refuse
from .census import own_parametrizations, parametrizations_of
from .checkpoint import WeightNormOriginals, unregister_load_hook
from .checkpoint.loading import loads_for
from .hook_ids import count_on_from, last_hook_id
from .keys import legacy_keys
from .removal import take_removal_hook
from .write_guards import WRITE_GUARDS


def own_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own, so that the class can be changed.

    Modules share classes (see :func:`share_class`), and so do copies made by deepcopy.
    Parametrizing one more parameter, or removing a parametrization, changes properties of the
    class, and the other modules would lose their weights. A class that only one module has is kept,
    because registries of subclasses see every new class.
    """
    cls = type(module)
    if is_ours(cls) and _SHARED not in vars(cls):
        return
    make = type if type(cls) is _Shared else type(cls)
    module.__class__ = make(cls.__name__, cls.__bases__, _members(cls))


def _members(cls: type[nn.Module]) -> dict[str, Any]:
    left_out = ("__dict__", "__weakref__", "_abc_impl", "__abstractmethods__", _SHARED)
    return {k: v for k, v in vars(cls).items() if k not in left_out}


def share_class(module: nn.Module) -> None:
    """Give a module with weight norms the class of other modules whose classes would be equal.

    A compiler compiles code again for each class that it meets, and gives up after a few. Blocks
    that are compiled one by one become one program only if their layers have the same classes.
    """
    lists = own_parametrizations(module)
    if all(isinstance(weights, WeightNormOriginals) for weights in lists.values()):
        _share_class(module, lists)


def _share_class(module: nn.Module, normed: Iterable[str]) -> None:
    cls = type(module)
    members = frozenset(vars(cls)) - _MEMBERS
    expected = {key for name in normed for key in (name, *legacy_keys(name))}
    if not is_ours(cls) or not members <= expected or _is_registered(cls):
        return
    shared: Any = _shared_classes.get((cls.__bases__, members))
    if shared is None or _members(shared) != vars(shared)[_SHARED]:  # other code changed it
        made = _members(cls)
        shared = _Shared(cls.__name__, cls.__bases__, made | {_SHARED: made})
        _shared_classes[cls.__bases__, members] = shared
    module.__class__ = shared


class _Shared(ABCMeta):
    """The type of a class that several modules share.

    torch's ``remove_parametrizations`` deletes the property of a weight from the class of a module,
    although other modules use it. A shared class keeps the property, and the module gets a class of
    its own without it.

    It derives from ABCMeta, so that a class can inherit from a shared and from an abstract one.
    """

    def __delattr__(cls, name: str) -> None:
        made = vars(cls).get(_SHARED, {}).get(name)
        if not isinstance(made, property) or vars(cls).get(name) is not made:
            super().__delattr__(name)


def _is_registered(cls: type[nn.Module]) -> bool:
    """Whether other code sees every new class, by a metaclass or by ``__init_subclass__``. It must
    not see more classes than torch makes."""
    return type(cls) is not type or any("__init_subclass__" in vars(c) for c in cls.__mro__[:-1])


_SHARED = "_weight_norm_shared"
"""The attribute that marks a class that several modules may have. If :func:`share_class` made the
class, its value holds the members that the class was made with."""

_shared_classes: WeakValueDictionary[tuple[Any, ...], Any] = WeakValueDictionary()


def is_ours(cls: type[nn.Module]) -> bool:
    """Whether :func:`adopt_class` has changed a class."""
    return vars(cls).get("register_parameter") is _register_parameter


def adopt_class(module: nn.Module, name: str) -> None:
    """Change the class of a parametrized module, for a weight norm on one of its parameters."""
    cls: Any = type(module)
    _add_property(cls, name)
    if is_ours(cls):
        return
    cls.register_parameter = _register_parameter
    cls.register_buffer = _register_buffer
    cls.__delattr__ = _delattr
    for attribute, guard in WRITE_GUARDS.items():
        if not hasattr(cls, attribute):
            setattr(cls, attribute, guard)
    cls.__new__ = staticmethod(_new)
    cls.__signature__ = _Signature()
    cls.__reduce_ex__ = _reduce
    cls.__deepcopy__ = _deepcopy_by(cls.__deepcopy__)


_MEMBERS = frozenset(
    (
        *("register_parameter", "register_buffer", "__delattr__", *WRITE_GUARDS, "__new__"),
        *("__signature__", "__reduce_ex__", "__deepcopy__", "__getstate__", "__module__"),
        *("__doc__", "__dict__", "__weakref__", _SHARED),
    )
)
"""The members of every class that :func:`adopt_class` has changed, besides its weights."""


def _add_property(cls: type[nn.Module], name: str) -> None:
    setattr(cls, name, property(_reader(name), _writer(name), _deleter(name)))


def _reader(name: str) -> Callable[[nn.Module], Tensor]:
    """The getter of a weight. torch's getter refers to the module that it was made for, so this
    module and each of its copies would wait for the garbage collector."""

    def read(self: Any) -> Tensor:
        try:
            weights = self._modules["parametrizations"]._modules[name]
        except KeyError:  # the module is being made, or a removal is under way
            raise AttributeError(name) from None
        if parametrize._cache_enabled:
            return _read_cached(weights)
        return weights.__call__()  # torch 2.5 would compile `weights()` as its forward

    return read


def _writer(name: str) -> Callable[[nn.Module, Tensor], None]:
    def write(self: nn.Module, value: Tensor) -> None:
        assign(self, name, value)

    return write


def _deleter(name: str) -> Callable[[nn.Module], None]:
    """The deleter of a weight, which does nothing, because no weight is stored. With torch's legacy
    hook ``del module.weight`` deletes the weight of the last forward, as some code does before a
    copy."""

    def delete(self: nn.Module) -> None:
        if not parametrize.is_parametrized(self, name):
            raise AttributeError(name)

    return delete


def _read_cached(weights: parametrize.ParametrizationList) -> Tensor:
    """Read a weight within ``parametrize.cached()``. torch's keys contain the ``id`` of a module,
    which another module can get once the first is deleted. Here the keys are the lists themselves.
    Modules cannot be keys, because they may define their own equality."""
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError("Cannot trace a model while caching parametrizations.")  # as torch does
    cache: dict[Any, Any] = parametrize._cache
    if weights not in cache:
        cache[weights] = weights()
    return cache[weights]


def forget_cached(module: nn.Module, name: str) -> None:
    """Make the next read within ``parametrize.cached()`` compute the weight again."""
    cache: dict[Any, Any] = parametrize._cache
    cache.pop(parametrizations_of(module, name), None)


def _register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
    if register_by_legacy_name(self, name, param):
        return
    if isinstance(name, str) and name.startswith("parametrizations."):
        refuse(self, name, param)
    if param is not None and parametrize.is_parametrized(self, name):
        if type(param) is not nn.Parameter:
            refuse(self, name, param)
        assign(self, name, param)
        return
    _next(self, "register_parameter")(name, param)
    _forget(self, name)


def _register_buffer(self: nn.Module, name: str, *args: Any, **kwargs: Any) -> None:
    _next(self, "register_buffer")(name, *args, **kwargs)
    _forget(self, name)


def _forget(module: nn.Module, name: str) -> None:
    """Remove what is left of a weight norm after torch's ``remove_parametrizations``, which
    registers the plain weight as its last step. Before that it has deleted the property of the
    weight, except from a class that several modules share."""
    if parametrize.is_parametrized(module, name):
        return
    cls = type(module)
    if type(cls) is _Shared and name in vars(cls):
        own_class(module)
        delattr(type(module), name)
    hooks = module.__dict__.get("_load_state_dict_pre_hooks") or {}
    if any(loads_for(wrapped.hook) == name for wrapped in hooks.values()):
        cls = type(module)
        own_class(module)
        if type(module) is not cls:  # copies share cls
            _add_property(cls, name)
        unregister_load_hook(module, name)
        take_removal_hook(module, name)
        forget_legacy_names(module, name)


def _delattr(self: nn.Module, name: str) -> None:
    """Delete an attribute. A parametrization may be about to take the place of a parameter and to
    change the class, so the module first gets a class of its own."""
    if name in self._parameters or name in self._buffers:
        own_class(self)
    _next(self, "__delattr__")(name)


def _last_of_ours(cls: type[nn.Module]) -> type[nn.Module]:
    """The last class in the method resolution order that :func:`adopt_class` changed."""
    return [c for c in cls.__mro__ if is_ours(c)][-1]


def _plain_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of a module before it got a weight norm."""
    return _last_of_ours(cls).__bases__[0]


def _next(module: nn.Module, method: str) -> Callable[..., Any]:
    """The method that the method of this file overrides."""
    return getattr(super(_last_of_ours(type(module)), module), method)


def _new(cls: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """Make a plain module for ``type(module)(4, 2, 1)``. A module of this class would have no
    weight norm either, but a property instead of its weight, which torch.compile cannot handle.
    Without arguments this makes the empty module that a copy begins with."""
    base = _plain_class(cls)
    if args or kwargs:
        return base(*args, **kwargs)
    if _SHARED not in vars(cls):
        setattr(cls, _SHARED, True)
    return base.__new__(cls)


class _Signature:
    """``inspect.signature(type(module))``, which is the signature of the plain class."""

    def __get__(self, module: nn.Module | None, cls: type[nn.Module]) -> inspect.Signature:
        if module is not None:
            raise AttributeError("__signature__")  # calling a module has another signature
        return inspect.signature(_plain_class(cls))


def _deepcopy_by(
    of_torch: Callable[[nn.Module, dict[int, Any]], nn.Module],
) -> Callable[[nn.Module, dict[int, Any]], nn.Module]:
    """Extend the ``__deepcopy__`` of parametrize or of the module for RNNs that have run. An RNN
    holds the weights of its last forward, and deepcopy refuses tensors with a history."""

    def deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        for w in getattr(self, "_flat_weights", ()):
            if isinstance(w, Tensor) and not w.is_leaf:
                memo[id(w)] = w.detach().clone()
        return of_torch(self, memo)

    return deepcopy


def _reduce(self: nn.Module, protocol: int) -> str | tuple[Any, ...]:
    """Pickle a module. Nobody can import its class, so the parts of the class are pickled."""
    if vars(type(self)).get("__reduce_ex__") is not _reduce:  # others changed its class after us
        return object.__reduce_ex__(self, protocol)
    ours, base = _last_of_ours(type(self)), _plain_class(type(self))
    if (base.__reduce_ex__, base.__reduce__) != (object.__reduce_ex__, object.__reduce__):
        return super(ours, self).__reduce_ex__(protocol)  # the plain class pickles itself
    getstate = getattr(super(ours, self), "__getstate__", None)  # object has one since Python 3.11
    state = dict(vars(self)) if getstate is None else getstate()
    if isinstance(self, nn.RNNBase):  # it holds weights with their history
        state["_flat_weights"] = [
            w.detach() if isinstance(w, Tensor) and not w.is_leaf else w
            for w in state["_flat_weights"]
        ]
    lists = own_parametrizations(self)
    normed = [name for name in lists if isinstance(lists[name], WeightNormOriginals)]
    legacy = [name for name in lists if has_legacy_names(self, name)]
    last = last_hook_id([self, *lists.values()])
    return _unpickled, (base, list(lists), normed, legacy, last), state


def _unpickled(
    base: type[nn.Module],
    names: Sequence[str],
    normed: Sequence[str],
    legacy: Sequence[str],
    last_hook: int,
) -> nn.Module:
    """Make a module without state, whose class is like the class of the pickled module."""
    count_on_from(last_hook)
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
    if names and set(names) == set(normed):
        _share_class(module, names)
    return module
