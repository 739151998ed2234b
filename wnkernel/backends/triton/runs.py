"""A forward and a backward: from tensors to addresses, and to launches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...forms import Problems
from ...streams import guard
from .arrays import allocator, dense, ordered_like
from .launch import BACKWARD, FORWARD, Launcher
from .layouts import Layout

Column = list[int]
"""Addresses of an array of all weights of a list."""

_address, _stride, _is_neg = Tensor.data_ptr, Tensor.stride, Tensor.is_neg


class Norms(Sequence[Tensor]):
    """The norms of a list in one piece of memory, and where v and g were when they were computed.
    A backward needs the addresses only."""

    __slots__ = ("_layout", "_memory", "addresses", "g", "v")

    def __init__(self, memory: Tensor, layout: Layout, v: Column, g: Column) -> None:
        self._memory, self._layout = memory, layout
        self.addresses = layout.norms.addresses(memory)
        self.v, self.g = v, g

    def are_of(self, many: Problems, v: Column, g: Column, w_dtypes: list[torch.dtype]) -> bool:
        """Whether v and g are where they were, and as they were. Versions do not tell: ``.data``
        of a parameter may have been replaced by other strides of the same memory."""
        return (
            self.v == v
            and self.g == g
            and self._layout.w_dtypes == w_dtypes
            and self._layout.is_of(many.v, many.g)
        )

    def __len__(self) -> int:
        return len(self.v)

    def __getitem__(self, k: int) -> Tensor:
        return self._layout.norms.tensor(self._memory, k)


def forward(
    launcher: Launcher, many: Problems, *, apart: bool
) -> tuple[list[Tensor], Sequence[Tensor]]:
    """``w`` and ``norm`` of one weight or more; ``apart``: every norm has memory of its own, and no
    table is kept."""
    many, layout = _ready(launcher, many)
    with guard(layout.device):
        allocate = allocator(layout.device)
        w = layout.like_v.make(allocate, layout.w_dtypes)
        columns = [list(map(_address, column)) for column in (many.v, many.g, w)]
        if apart:
            norms = layout.like_g.make(allocate, layout.norm_dtypes)
            columns.append(list(map(_address, norms)))
        else:
            norms = Norms(layout.norms.make(allocate), layout, *columns[:2])
            columns.append(norms.addresses)
        for group in layout.groups:
            addresses = group.of(columns)
            batch = group.batch(FORWARD, addresses[0], addresses[2])
            inputs = {"v": many.v, "g": many.g}
            launcher.launch(batch, addresses, inputs, keep=not apart)
    for k in layout.empty:
        norms[k].zero_()
    return w, norms


def backward(
    launcher: Launcher,
    many: Problems,
    norms: Sequence[Tensor],
    grad_ws: Sequence[Tensor],
    need_v: Sequence[bool],
    need_g: Sequence[bool],
    *,
    apart: bool,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """``grad_v`` and ``grad_g`` of one weight or more, None where not needed. At least one of the
    two is needed of each. ``apart``: no table is kept."""
    v, g = list(map(_address, many.v)), list(map(_address, many.g))
    dtypes = [t.dtype for t in grad_ws]
    if not (isinstance(norms, Norms) and norms.are_of(many, v, g, dtypes)):
        many = Problems(many.v, many.g, forms=many.forms_now(dtypes))
    asked = many
    many, layout = _ready(launcher, many)
    if many is not asked:
        v, g = list(map(_address, many.v)), list(map(_address, many.g))
    grad_ws = _ordered(grad_ws, many.v, layout)
    with guard(layout.device):
        allocate = allocator(layout.device)
        grad_v = layout.like_v.make(allocate, layout.v_dtypes, need_v)
        grad_g = layout.like_g.make(allocate, layout.g_dtypes, need_g)
        columns = [
            list(map(_address, grad_ws)),
            v,
            g,
            norms.addresses if isinstance(norms, Norms) else list(map(_address, norms)),
            _addresses(grad_v, need_v),
            _addresses(grad_g, need_g),
        ]
        for group in layout.groups:
            addresses = group.of(columns)
            batch = group.batch(BACKWARD, addresses[0], addresses[1], addresses[4])
            inputs = {"v": many.v, "g": many.g, "grad_w": grad_ws}
            launcher.launch(batch, addresses, inputs, keep=not apart)
    for k in layout.empty:  # a norm of no elements does not depend on anything
        if (t := grad_g[k]) is not None:
            t.zero_()
    return grad_v, grad_g


def _ready(launcher: Launcher, many: Problems) -> tuple[Problems, Layout]:
    """The weights, with copies of what kernels cannot read where it is."""
    layout = _layout(launcher, many)
    if layout.is_ready:
        return many, layout
    v = [dense("v", t) for t in many.v]
    g = [dense("g", t).contiguous() for t in many.g]
    many = Problems(v, g, many.options)
    return many, _layout(launcher, many)


def _layout(launcher: Launcher, many: Problems) -> Layout:
    return launcher.layouts.get(tuple(many.forms), lambda: Layout(many))


def _ordered(grad_ws: Sequence[Tensor], v: Sequence[Tensor], layout: Layout) -> Sequence[Tensor]:
    """Gradients in the memory order of v."""
    if list(map(_stride, grad_ws)) == layout.like_v.strides and not any(map(_is_neg, grad_ws)):
        return grad_ws
    return [ordered_like("grad_w", *each) for each in zip(grad_ws, v, strict=True)]


def _addresses(tensors: Sequence[Tensor | None], needed: Sequence[bool]) -> Column:
    """0 for none."""
    if all(needed):
        return list(map(_address, tensors))
    return [0 if t is None else t.data_ptr() for t in tensors]
