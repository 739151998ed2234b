"""Weights for the tests that need a GPU, what is computed of them, and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wnkernel import functional as F

from ..cases import randn, randn_g

SHAPES: dict[str, tuple[tuple[int, ...], int | None]] = {
    "rows": ((300, 256), 0),
    "odd rows": ((300, 37), 0),
    "rows of 60 KB": ((5, 15_000), 0),  # more than a program keeps
    "few rows": ((3, 200_000), 0),  # several programs for each
    "whole": ((701, 411), None),
    "runs": ((40, 30, 128), 1),
    "odd runs": ((41, 30, 99), 1),
    "columns": ((3000, 64), 1),
    "odd columns": ((3001, 37), 1),
    "narrow": ((20_000, 3), 1),
}
"""Name -> shape and dim. Every way of cutting a weight, and more than one program each."""


class Weight(NamedTuple):
    """A weight norm and the gradient of its result."""

    v: Tensor
    g: Tensor
    dim: int | None
    grad_w: Tensor


def weights(
    dtype: torch.dtype = torch.float32,
    g_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    names: Iterable[str] = SHAPES,
) -> list[Weight]:
    """Random ones, of each of some shapes."""
    return [
        Weight(
            randn(shape, dtype).requires_grad_(),
            randn_g(shape, dim, g_dtype or dtype).requires_grad_(),
            dim,
            randn(shape, out_dtype or dtype),
        )
        for shape, dim in (SHAPES[name] for name in names)
    ]


def results(
    chosen: Sequence[Weight], *, together: bool, out_dtype: torch.dtype | None = None
) -> list[Tensor]:
    """All w, then all grad_v and grad_g: of a list, or one by one."""
    vs, gs, dims, grad_ws = (list(column) for column in zip(*chosen, strict=True))
    if together:
        ws = F.weight_norms(vs, gs, dims, out_dtype=out_dtype)
    else:
        ws = [
            F.weight_norm(v, g, dim, out_dtype=out_dtype)
            for v, g, dim in zip(vs, gs, dims, strict=True)
        ]
    return [*(w.detach() for w in ws), *torch.autograd.grad(ws, [*vs, *gs], grad_ws)]


def change(chosen: Iterable[Weight]) -> None:
    """Other numbers in the same memory."""
    with torch.no_grad():
        for t in (t for w in chosen for t in (w.v, w.g, w.grad_w)):
            t.lerp_(torch.randn_like(t), 0.3)


def assert_same_bits(got: Iterable[Tensor], want: Iterable[Tensor]) -> None:
    """Of tensors without NaN."""
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), k
        assert torch.equal(a, b), f"tensor {k}: {int((a != b).sum())} of {a.numel()} differ"


class Captured:
    """A call in a CUDA graph, after two outside of it. ``between`` is called before the capture."""

    def __init__(
        self, call: Callable[[], list[Tensor]], between: Callable[[], object] = lambda: None
    ) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        between()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            self._results = call()

    def replay(self) -> list[Tensor]:
        """What the call gives now."""
        for t in self._results:
            t.detach().fill_(float("nan"))
        self._graph.replay()
        torch.cuda.synchronize()
        return self._results
