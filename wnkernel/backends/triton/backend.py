"""The backend of the Triton kernels, which turns tensors into addresses. Triton is imported only
when a kernel runs for the first time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from operator import or_
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ... import native
from ...forms import Problems, spread
from ...problem import Problem, check, row_view
from ...streams import GPUS, guard
from . import availability
from .arrays import dense, ordered_like
from .plan import VECTOR_BYTES, Kind, plan, tiles
from .tables import BACKWARD, FORWARD

if TYPE_CHECKING:
    from .launch import Launcher, Prepared

Column = list[int]
"""The addresses of one array, such as v, for all weights of a list."""

_LEAST_EPS = 5e-324
"""Replaces an eps of 0. Launches raise it to the smallest normal number."""

_address, _stride, _is_neg = Tensor.data_ptr, Tensor.stride, Tensor.is_neg


class Norms(Sequence[Tensor]):
    """The norms of a list in one piece of memory, and the addresses that v and g had when the norms
    were computed. A backward needs only the addresses of the norms, so tensors are made on demand.
    """

    __slots__ = ("_memory", "_prepared", "addresses", "g", "v")

    def __init__(self, prepared: Prepared, v: Column, g: Column) -> None:
        self._memory, self._prepared = prepared.norms.make(prepared.allocate), prepared
        self.addresses = prepared.norms.addresses(self._memory)
        self.v, self.g = v, g

    def are_of(self, many: Problems, v: Column, g: Column, w_dtypes: list[torch.dtype]) -> bool:
        """Return whether v and g still have the addresses, sizes, strides and dtypes that they had
        when the norms were computed. Versions do not tell this: an assignment to ``.data`` can give
        a parameter other strides over the same memory."""
        return (
            self.v == v
            and self.g == g
            and self._prepared.w_dtypes == w_dtypes
            and self._prepared.is_of(many.v, many.g)
        )

    def __len__(self) -> int:
        return len(self.v)

    def __getitem__(self, k: int) -> Tensor:  # type: ignore[override]  # nobody slices norms
        return self._prepared.norms.tensor(self._memory, k)


class TritonBackend:
    """GPU kernels in Triton for NVIDIA, AMD and Intel, compiled at first use.

    If TRITON_INTERPRET=1 was set before Triton was imported, the kernels run on the CPU in Triton's
    interpreter. That is slow and meant for tests, so the automatic choice never uses it.
    """

    name = "triton"
    is_compiled = is_traceable = False

    def __init__(self) -> None:
        self.operator_devices = [d for d in GPUS if native.has_no_kernels_on(d)]
        """The device types on which ``torch.ops.wnkernel`` runs these kernels."""
        self._used: set[torch.device] = set()
        """The devices on which kernels have run, so that :meth:`takes` need not check them."""

    def missing(self) -> list[str]:
        return [reason] if (reason := availability.missing()) else []

    def takes(self, v: Tensor) -> bool:
        # Dynamo must not read _used: it would compile the graph again when _used changes.
        is_known = not is_dynamo_compiling() and v.device in self._used
        return is_known or availability.takes(v.device)

    def reasons(self, v: Tensor) -> list[str]:
        return [] if self.takes(v) else [availability.reason(v.device)]

    def is_automatic(self, v: Tensor) -> bool:
        return v.device.type != "cpu"

    def has_operators(self, v: Tensor) -> bool:
        return v.device.type in self.operator_devices

    def norm(self, v: Tensor, g: Tensor, dim: int, eps: float) -> Tensor:
        return self.weights([check(v, g, dim, eps)], apart=True)[1][0]

    def weights(
        self, problems: Sequence[Problem], *, apart: bool = False
    ) -> tuple[list[Tensor], Sequence[Tensor]]:
        """Return w and norm of every problem.

        Args:
            problems: the checked weight norms.
            apart: whether an operator calls, which a compiler may run in memory that it manages.
                Then each norm has its own memory, because norms leave the package, and no
                allocated memory is kept after the call.
        """
        return self._forward(problems, (), apart)

    def forced(
        self, problems: Sequence[Problem], forced: Sequence[float], *, apart: bool = False
    ) -> tuple[list[Tensor], Sequence[Tensor]]:
        """Force norms, and return w and norm of every problem, in one launch.

        With ``forced`` > 0, v becomes ``forced * v / n`` in place, where n is that of a weight norm
        (csrc/weight_norm.h); such a v must be dense. w and norm are those of the new v before it is
        rounded. With 0, v stays. A row of zeros stays too, and its w is 0 even if eps is 0. The
        rest is as in :meth:`weights`.
        """
        found = self._forward(problems, forced, apart)
        _count_writes([p.v for p, norm in zip(problems, forced, strict=True) if norm])
        return found

    def _forward(
        self, problems: Sequence[Problem], forced: Sequence[float], apart: bool
    ) -> tuple[list[Tensor], Sequence[Tensor]]:
        if not problems:
            return [], []
        many, prepared = self._ready(Problems.of(problems), forced)
        with guard(prepared.device):
            w = prepared.like_v.make(prepared.allocate, prepared.w_dtypes)
            columns = [list(map(_address, column)) for column in (many.v, many.g, w)]
            norms: Sequence[Tensor]
            if apart:
                norms = prepared.like_g.make(prepared.allocate, prepared.norm_dtypes)
                columns.append(list(map(_address, norms)))
            else:
                norms = together = Norms(prepared, *columns[:2])
                columns.append(together.addresses)
            for group in prepared.groups:
                addresses = group.of(columns)
                batch = group.batch(FORWARD, addresses[0], addresses[2])
                inputs = {"v": many.v, "g": many.g}
                self._launcher.launch(batch, addresses, inputs, keep=not apart)
        for k in prepared.empty:
            norms[k].zero_()
        self._used.add(prepared.device)
        return w, norms

    def normalize_(self, problems: Sequence[Problem]) -> list[Tensor]:
        """Write w of every problem over its v. A row of zeros stays, because every norm has a bound
        here; the bound is no larger than the smallest norm that the kernels can divide by."""
        bounded = [replace(p, eps=p.eps or _LEAST_EPS) for p in problems]
        many, prepared = self._ready(Problems.of(bounded))
        with guard(prepared.device):
            norms = prepared.like_g.make(prepared.allocate, prepared.norm_dtypes)
            v, g, norm = (list(map(_address, column)) for column in (many.v, many.g, norms))
            for group in prepared.groups:
                addresses = group.of([v, g, v, norm])
                batch = group.batch(FORWARD, addresses[0])
                self._launcher.launch(batch, addresses, {"v": many.v, "g": many.g})
        _count_writes([p.v for p in problems])
        for k in prepared.empty:
            norms[k].zero_()
        self._used.add(prepared.device)
        return norms

    def gradients(
        self,
        problems: Sequence[Problem],
        norms: Sequence[Tensor],
        grad_ws: Sequence[Tensor],
        need_v: Sequence[bool],
        need_g: Sequence[bool],
        *,
        apart: bool = False,
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        """Return grad_v and grad_g of every problem, with ``apart`` as in :meth:`weights`."""
        many = Problems.of(problems)
        live = [k for k, needs in enumerate(map(or_, need_v, need_g)) if needs]
        if not live:
            return [None] * len(problems), [None] * len(problems)
        if len(live) < len(many):
            many = many.at(live)
            norms, grad_ws = [norms[k] for k in live], [grad_ws[k] for k in live]
            need_v, need_g = [need_v[k] for k in live], [need_g[k] for k in live]
        grads = self._backward(many, norms, grad_ws, need_v, need_g, apart=apart)
        grad_v, grad_g = (spread(column, live, len(problems)) for column in grads)
        return grad_v, grad_g

    def _backward(
        self,
        many: Problems,
        norms: Sequence[Tensor],
        grad_ws: Sequence[Tensor],
        need_v: Sequence[bool],
        need_g: Sequence[bool],
        *,
        apart: bool,
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Compute gradients of at least one weight, of which each needs grad_v, grad_g or both."""
        v, g = list(map(_address, many.v)), list(map(_address, many.g))
        dtypes = [t.dtype for t in grad_ws]
        if not (isinstance(norms, Norms) and norms.are_of(many, v, g, dtypes)):
            many = Problems(many.v, many.g, forms=many.forms_now(dtypes))
        asked = many
        many, prepared = self._ready(many)
        if many is not asked:
            v, g = list(map(_address, many.v)), list(map(_address, many.g))
        grad_ws = _ordered(grad_ws, many.v, prepared.like_v.strides)
        with guard(prepared.device):
            grad_v = prepared.like_v.make(prepared.allocate, prepared.v_dtypes, need_v)
            grad_g = prepared.like_g.make(prepared.allocate, prepared.g_dtypes, need_g)
            columns = [
                list(map(_address, grad_ws)),
                v,
                g,
                norms.addresses if isinstance(norms, Norms) else list(map(_address, norms)),
                _addresses(grad_v, need_v),
                _addresses(grad_g, need_g),
            ]
            for group in prepared.groups:
                addresses = group.of(columns)
                batch = group.batch(BACKWARD, addresses[0], addresses[1], addresses[4])
                inputs = {"v": many.v, "g": many.g, "grad_w": grad_ws}
                self._launcher.launch(batch, addresses, inputs, keep=not apart)
        for k in prepared.empty:  # the norm of no elements is constant
            if (t := grad_g[k]) is not None:
                t.zero_()
        return grad_v, grad_g

    def fits_on_chip(self, p: Problem) -> bool:
        """Return whether kernels read v (and grad_w) only once, so that callers can count bytes."""
        view = row_view(dense("v", p.v), p.dim)
        vector = VECTOR_BYTES // p.v.element_size()
        cut = plan(view.outer, view.rows, view.inner, p.v.element_size(), vector)
        return tiles(p.v.element_size())[cut.tile].kind is Kind.ROWS

    def variants(self) -> dict[str, int] | None:
        """Return how many variants of the kernels this process has launched, and how many there can
        be for one combination of dtypes. A variant is compiled at its first launch, or taken from
        Triton's cache on disk. Return None if Triton cannot run."""
        if self.missing():
            return None
        from . import variants

        return {"launched": variants.launched(), "at_most_per_dtypes": variants.most()}

    def _ready(self, many: Problems, forced: Sequence[float] = ()) -> tuple[Problems, Prepared]:
        """Return the weights, with copies of any v and g that kernels cannot read in place."""
        prepared = self._launcher.prepared(many, forced)
        if prepared.is_ready:
            return many, prepared
        v = [dense("v", t) for t in many.v]
        g = [dense("g", t).contiguous() for t in many.g]
        many = Problems(v, g, many.options)
        return many, self._launcher.prepared(many, forced)

    @cached_property
    def _launcher(self) -> Launcher:
        from .launch import Launcher

        # If two threads get here at once, both must take the same launcher: captured graphs use its
        # memory, so no launcher may be dropped.
        return vars(self).setdefault("_launcher", Launcher())


def _count_writes(written: Sequence[Tensor]) -> None:
    """Tell autograd that kernels have written to tensors."""
    for t in written:
        if not t.is_inference():
            torch.autograd.graph.increment_version(t)


def _ordered(
    grad_ws: Sequence[Tensor], v: Sequence[Tensor], strides: Sequence[tuple[int, ...]]
) -> Sequence[Tensor]:
    """Return gradients in the memory order of v; ``strides`` are those of v."""
    if list(map(_stride, grad_ws)) == strides and not any(map(_is_neg, grad_ws)):
        return grad_ws
    return [ordered_like("grad_w", *each) for each in zip(grad_ws, v, strict=True)]


def _addresses(tensors: Sequence[Tensor | None], needed: Sequence[bool]) -> Column:
    """Return the addresses of tensors, with 0 for None."""
    if all(needed):
        return list(map(_address, cast(Sequence[Tensor], tensors)))
    return [0 if t is None else t.data_ptr() for t in tensors]
