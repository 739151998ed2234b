"""Launches lists of weights.

A training step asks for the same weights as the step before. So everything that does not depend on
addresses is prepared once for a list.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import attrgetter, or_

import torch
from torch import Tensor

from ...forms import Problems
from ...problem import accumulation_dtype, bound_of, is_dense, row_view
from ...streams import current_stream, is_capturing
from . import variants
from .arrays import Packed, Results, allocator, check_memory
from .plan import VECTOR_BYTES, plan, tiles
from .tables import FORWARD, Direction, Kept, Table, Uploads, Weight, bits_of, build, workspace
from .variants import Types

PREPARED = 1024
"""The number of prepared lists that a thread keeps. A single weight is a list too, and a model has
up to a hundred weights of different shapes."""

BATCHES = 8
"""The number of batches that a group keeps; then it forgets all of them. There is a batch for each
direction and each pattern of addresses that are no multiples of 16 bytes. Gradients in flat buffers
have many patterns."""

_is_neg, _dtype = Tensor.is_neg, attrgetter("dtype")


class Batch:
    """The launches for weights of the same dtypes on one device, in one direction. A batch holds no
    addresses. The tables on the device are kept for each batch."""

    def __init__(
        self, direction: Direction, t: Types, weights: Sequence[Weight], device: torch.device
    ) -> None:
        self.weights, self.device, self.acc_dtype = weights, device, accumulation_dtype(t.v)
        itemsize = t.v.itemsize
        self.table: Table | None = None
        """The table of a list; None for a single weight."""
        self.sizes: tuple[int, ...] = ()
        """The arguments of a single weight's kernel after the addresses: the bits of eps and, in a
        forward, of forced, and the sizes of the plan. Empty for a list."""
        if len(weights) > 1:
            self.table = table = build(weights, itemsize, direction)
            self.workspace = table.workspace
            first = variants.of_list(direction, t, table.rows_only, 0, device)
            self.launches = [(first, table.programs)]
            if table.programs_to_finish:
                second = variants.of_list(direction, t, False, 1, device)
                self.launches.append((second, table.programs_to_finish))
        else:
            (w,) = weights
            p = plan(w.outer, w.rows, w.inner, itemsize, w.vector)
            tile = tiles(itemsize)[p.tile]
            numbers = [bits_of(w.eps), *([bits_of(w.forced)] if direction is FORWARD else [])]
            self.sizes = *numbers, *p[1:-1]
            self.workspace = workspace(p, itemsize, direction)
            self.launches = [
                (variants.of_one(direction, t, tile, finish, device), p.programs)
                for finish in range(2 if p.split > 1 else 1)
            ]


class Group:
    """The weights of a list that have the same dtypes."""

    def __init__(
        self, types: Types, places: Sequence[int], many: Problems, forced: Sequence[float]
    ) -> None:
        self.types, self.places = types, places
        self._device = many.v[0].device
        options = many.options
        self._views = [row_view(many.v[k], options[k][0]) for k in places]
        acc = accumulation_dtype(self.types.v)
        self._eps = [_bound(options[k][1], acc) for k in places]
        self._forced = [forced[k] if forced else 0.0 for k in places]
        self._is_all = len(places) == len(many)
        self._batches: dict[tuple[object, ...], Batch] = {}

    def of(self, columns: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        """Return the entries of this group's weights from each column."""
        if self._is_all:
            return columns
        return [[column[k] for k in self.places] for column in columns]

    def batch(self, direction: Direction, *like_v: Sequence[int]) -> Batch:
        """Return the launches for the addresses ``like_v`` of all arrays that are laid out like v.

        Accesses are as wide as all these addresses allow. The dtypes of the arrays other than v do
        not matter: a gradient in the dtype of autocast gives the same bits as after a cast.
        """
        bits = 0
        for column in like_v:
            bits |= reduce(or_, column)
        odd: tuple[bool, ...] = ()
        if bits % VECTOR_BYTES:
            odd = tuple(any(a % VECTOR_BYTES for a in each) for each in zip(*like_v, strict=True))
        key = direction, odd
        batch = self._batches.get(key)
        if batch is None:
            if len(self._batches) >= BATCHES:
                self._batches.clear()
            batch = self._batches[key] = self._batch(direction, odd or (False,) * len(self.places))
        return batch

    def _batch(self, direction: Direction, odd: Sequence[bool]) -> Batch:
        weights = [
            Weight(view.outer, view.rows, view.inner, 1 if o else self.types.vector, eps, forced)
            for view, eps, forced, o in zip(self._views, self._eps, self._forced, odd, strict=True)
        ]
        return Batch(direction, self.types, weights, self._device)


class Prepared:
    """Everything about a list that does not depend on addresses: the results to allocate, and the
    groups of weights with the same dtypes."""

    def __init__(self, many: Problems, forced: Sequence[float] = ()) -> None:
        self.device = many.v[0].device
        self.is_ready = all(map(_is_ready, many.v, many.g))
        """Whether kernels can read v and g in place, without copies."""
        self.allocate = allocator(self.device)
        self.like_v, self.like_g = Results(many.v), Results(many.g)
        self.v_dtypes = [v.dtype for v in many.v]
        self.g_dtypes = [g.dtype for g in many.g]
        self.w_dtypes = [out_dtype for _, _, out_dtype in many.options]
        self.norm_dtypes = [accumulation_dtype(v.dtype) for v in many.v]
        self.norms = Packed(many.g, self.norm_dtypes)
        self.empty: list[int] = []
        """The places of the weights without elements."""
        places: dict[Types, list[int]] = {}
        for k, types in enumerate(zip(self.v_dtypes, self.g_dtypes, self.w_dtypes, strict=True)):
            if many.v[k].numel():
                places.setdefault(Types(*types), []).append(k)
            else:
                self.empty.append(k)
        ready = places.items() if self.is_ready else ()
        self.groups = [Group(*group, many, forced) for group in ready]

    def is_of(self, v: Sequence[Tensor], g: Sequence[Tensor]) -> bool:
        """Return whether kernels can read v and g in place, and v and g have the sizes, strides and
        dtypes of this list now."""
        return (
            self.is_ready
            and self.like_v.are_like(v)
            and self.like_g.are_like(g)
            and list(map(_dtype, v)) == self.v_dtypes
            and list(map(_dtype, g)) == self.g_dtypes
            and not any(map(_is_neg, v))
            and not any(map(_is_neg, g))
        )


def _bound(eps: float, acc_dtype: torch.dtype) -> float:
    """Return eps as kernels take it: neither a bound nor what is added to norms may vanish."""
    return math.copysign(bound_of(abs(eps), acc_dtype), eps)


def _is_ready(v: Tensor, g: Tensor) -> bool:
    dense = (v.is_contiguous() or is_dense(v)) and g.is_contiguous()
    return dense and not (v.is_neg() or g.is_neg())


class Launcher:
    """Launches batches, and keeps what is used again: prepared lists, tables, pinned memory."""

    def __init__(self) -> None:
        self._prepared = Kept(PREPARED)
        self._tables = Kept()
        self._line_of = Kept()
        self._uploads = Uploads()

    def prepared(self, many: Problems, forced: Sequence[float] = ()) -> Prepared:
        """Return the prepared list, which is kept for the next call.

        Args:
            many: the weights of the list.
            forced: the norm that each v gets first, 0 if it stays; empty if all stay.
        """
        key: object = tuple(many.forms)
        if any(forced):
            key = key, tuple(forced)
        return self._prepared.get(key, lambda: Prepared(many, forced))

    def launch(
        self,
        batch: Batch,
        addresses: Sequence[Sequence[int]],
        inputs: Mapping[str, Sequence[Tensor]],
        *,
        keep: bool = True,
    ) -> None:
        """Run one direction for the weights of a batch, whose device must be the current one.

        Args:
            batch: the launches to run.
            addresses: for each array that the kernels take, the addresses of all weights.
            inputs: the input tensors by name, to check that they have memory. A kept table with the
                same addresses needs no check, because a tensor has another address when its memory
                is freed.
            keep: whether tables on the device may be kept.

        Raises:
            RuntimeError: if a tensor has elements but no memory.
        """
        if batch.table is None:
            check_memory(inputs)
            partials = _workspace(batch)
            args = (*[column[0] for column in addresses], _address(partials), *batch.sizes)
            for variant, programs in batch.launches:
                variant.launch(programs, args)
            return
        lines, line_of = self._uploaded(batch, batch.table, addresses, inputs, keep)
        partials = _workspace(batch)
        table, place = lines.data_ptr(), line_of.data_ptr()
        for variant, programs in batch.launches:
            variant.launch(programs, (table, place, _address(partials)))
            place += line_of.itemsize * programs

    def _uploaded(
        self,
        batch: Batch,
        table: Table,
        addresses: Sequence[Sequence[int]],
        inputs: Mapping[str, Sequence[Tensor]],
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return the table of a list on its device: its lines with addresses, and which of them
        each program reads."""
        device = batch.device

        def lines() -> Tensor:
            check_memory(inputs)
            return self._uploads.copy(table.at(addresses), device)

        def line_of() -> Tensor:
            self._uploads.expect(table.lines.numel() + table.line_of.numel())
            return self._uploads.copy(table.line_of, device)

        capturing = is_capturing(device)
        if not capturing:
            self._uploads.refill(device)
        if capturing or not keep:  # a kept table may be dropped before a captured graph runs
            return lines(), self._uploads.copy(table.line_of, device)
        place = batch, current_stream(device)
        found = self._tables.get((*place, *map(tuple, addresses)), lines)
        return found, self._line_of.get(place, line_of)


def _workspace(batch: Batch) -> Tensor | None:
    if batch.workspace == 0:
        return None
    return torch.empty(batch.workspace, dtype=batch.acc_dtype, device=batch.device)


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
