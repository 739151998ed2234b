"""A memory of checked weight norms, so that the same arguments are not checked again.

A training step asks for the same weights as the step before it. The memory is looked up by all
properties that the checks depend on, which are read from the tensors each time, in one pass over
the lists. So any change of a tensor, however it was made, leads to another entry or to new checks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any, overload

import torch
from torch import Tensor

from .observers import are_plain
from .problem import Problem, check, check_eps, check_forward

KEPT = 4096
"""How many keys the memory holds; when it is full, it is emptied."""

Options = tuple[int, float, torch.dtype]
"""dim, eps and out_dtype of a :class:`Problem`."""


class Form:
    """All properties of a weight norm except the values and addresses of its tensors. Weight norms
    with equal properties share one object."""

    __slots__ = ("device", "options")

    def __init__(self, p: Problem) -> None:
        self.device = p.v.device
        self.options: Options = (p.dim, p.eps, p.out_dtype)


_known: dict[tuple[object, ...], Form] = {}

_size, _stride, _is_neg = Tensor.size, Tensor.stride, Tensor.is_neg
_dtype, _device = attrgetter("dtype"), attrgetter("device")


def forms_of(
    v: Sequence[Tensor],
    g: Sequence[Tensor],
    dim: Sequence[int | None],
    eps: Sequence[float],
    out_dtype: Sequence[torch.dtype | None],
) -> list[Form]:
    """The form of every weight of a list.

    Raises:
        TypeError: if an argument has the wrong type, layout or dtype.
        ValueError: if a shape, device, dim or eps is wrong.
    """
    weights = v, g, dim, eps, out_dtype
    try:
        forms: list[Any] = list(map(_known.get, _keys(*weights)))
    except (RuntimeError, TypeError):  # no strides or no hash; check() raises an error
        forms = [None] * len(v)
    if None in forms:
        known = zip(forms, *weights, strict=True)
        forms = [_checked(*weight) if form is None else form for form, *weight in known]
    return forms


def _keys(
    v: Sequence[Tensor],
    g: Sequence[Tensor],
    dim: Sequence[Any],
    eps: Sequence[Any],
    out_dtype: Sequence[Any],
) -> Iterator[tuple[object, ...]]:
    """The keys of the forms, from the current properties of the arguments. Tensors that are not
    strided raise an error, because they have no strides. The types of dim and eps are part of a key
    because True, 1 and 1.0 are equal keys of a dict, but only 1 is valid as a dim."""
    return zip(
        map(_size, v), map(_stride, v), map(_dtype, v), map(_device, v), map(_is_neg, v),
        map(_size, g), map(_stride, g), map(_dtype, g), map(_device, g), map(_is_neg, g),
        dim, map(type, dim), eps, map(type, eps), out_dtype, strict=True,
    )  # fmt: skip


def _key(v: Tensor, g: Tensor, dim: Any, eps: Any, out_dtype: Any) -> tuple[object, ...]:
    """The key of one weight, as :func:`_keys` makes it, in half the time."""
    return (
        v.size(), v.stride(), v.dtype, v.device, v.is_neg(),
        g.size(), g.stride(), g.dtype, g.device, g.is_neg(),
        dim, type(dim), eps, type(eps), out_dtype,
    )  # fmt: skip


def _checked(*weight: Any) -> Form:
    p = check(*weight, may_add=True)
    form = Form(p)
    if len(_known) >= KEPT:
        _known.clear()
    form = _known.setdefault(_key(p.v, p.g, *form.options), form)
    _known[_key(*weight)] = form
    return form


def known(
    v: Tensor, g: Tensor, dim: int | None, eps: float, out_dtype: torch.dtype | None
) -> Problems:
    """Check a weight norm as :func:`~wnkernel.problem.check` does, unless its form is known."""
    if not are_plain((v, g)):
        return Problems.of([check(v, g, dim, eps, out_dtype)])
    _refuse_negative((eps,))
    try:
        form = _known.get(_key(v, g, dim, eps, out_dtype))
    except (RuntimeError, TypeError):  # no strides or no hash
        form = None
    return Problems([v], [g], forms=[form or _checked(v, g, dim, eps, out_dtype)])


def known_list(
    v: Sequence[Tensor],
    g: Sequence[Tensor],
    dim: Sequence[int | None],
    eps: Sequence[float],
    out_dtype: torch.dtype | None,
) -> Problems:
    """Check a list as :func:`~wnkernel.problem.check_forward` does, unless the forms are known."""
    if are_plain((*v, *g)):
        _refuse_negative(eps)
        forms = forms_of(v, g, dim, eps, [out_dtype] * len(v))
        devices = [form.device for form in forms]
        if devices.count(devices[0]) == len(devices):
            return Problems(v, g, forms=forms)
    return Problems.of(check_forward(v, g, dim, eps, out_dtype))


def _refuse_negative(eps: Sequence[Any]) -> None:
    """Refuse a negative eps, which is known by now if other code of this package has passed it."""
    for each in eps:
        if isinstance(each, (int, float)) and each < 0:
            check_eps(each)


class Problems(Sequence[Problem]):
    """A list of checked weight norms, stored as columns, so that no object is made for each of
    them."""

    __slots__ = ("_forms", "_options", "g", "v")

    def __init__(
        self,
        v: Sequence[Tensor],
        g: Sequence[Tensor],
        options: Sequence[Options] | None = None,
        forms: list[Form] | None = None,
    ) -> None:
        self.v, self.g, self._options, self._forms = v, g, options, forms

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> Problems:
        """Turn a sequence of problems into columns."""
        if isinstance(problems, Problems):
            return problems
        options = [(p.dim, p.eps, p.out_dtype) for p in problems]
        return cls([p.v for p in problems], [p.g for p in problems], options)

    @property
    def options(self) -> Sequence[Options]:
        """dim, eps and out_dtype of each weight norm."""
        if self._options is None:
            self._options = [form.options for form in self.forms]
        return self._options

    def settle(self) -> None:
        """Read the options now. Graphs of compiled autograd guard them, and are compiled again if
        they are there in one step and still to be read in the next."""
        self._options = self.options

    @property
    def forms(self) -> list[Form]:
        """The form of each weight norm, as it was when this property was first read."""
        if self._forms is None:
            self._forms = self.forms_now()
        return self._forms

    def forms_now(self, out_dtype: Sequence[torch.dtype] | None = None) -> list[Form]:
        """The form of each weight norm as it is now. It changes if ``.data`` of a parameter is
        replaced, for example."""
        dim, eps, own = zip(*self.options, strict=True)
        return forms_of(self.v, self.g, dim, eps, own if out_dtype is None else out_dtype)

    def at(self, places: Sequence[int]) -> Problems:
        """The weight norms at the given places."""
        v, g, options = self.v, self.g, self.options
        return Problems(
            [v[k] for k in places], [g[k] for k in places], [options[k] for k in places]
        )

    def __len__(self) -> int:
        return len(self.v)

    @overload
    def __getitem__(self, k: int) -> Problem: ...
    @overload
    def __getitem__(self, k: slice) -> Problems: ...
    def __getitem__(self, k: int | slice) -> Problem | Problems:
        if isinstance(k, slice):
            return self.at(range(len(self))[k])
        return Problem(self.v[k], self.g[k], *self.options[k])


def spread(
    column: Sequence[Tensor | None], places: Sequence[int], length: int
) -> Sequence[Tensor | None]:
    """A column of ``length`` entries: those of ``column`` at the given places, and None
    elsewhere."""
    if len(places) == length:
        return column
    out: list[Tensor | None] = [None] * length
    for k, entry in zip(places, column, strict=True):
        out[k] = entry
    return out
