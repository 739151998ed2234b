"""Any list of weights, and any fused model: their bits are those of each weight alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import wnkernel
from wnkernel import functional as F
from wnkernel.backends import BACKENDS

from ..reference import bits
from . import cases
from .weights import Weight, weights

HERE = torch.empty(0, device="cpu")
needs_cpu = pytest.mark.skipif(bool(BACKENDS["cpu"].reasons(HERE)), reason="needs wnkernel._C")
lists = st.lists(weights(far=True, most=(60, 2000, 60_000)), min_size=1, max_size=7)


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def grads_of(ws: list[Tensor], vs: list[Tensor], gs: list[Tensor], seeds: list[Tensor]):
    return torch.autograd.grad(ws, [t for t in (*vs, *gs) if t.requires_grad], seeds)


def assert_same(got, want) -> None:
    for a, b in zip(got, want, strict=True):
        assert torch.equal(bits(a), bits(b))


@needs_cpu
@settings(max_examples=cases(200) // 2, deadline=None, derandomize=not cases(0))
@given(lists, st.booleans())
def test_lists_on_any_threads_are_like_single_weights(xs: list[Weight], one_dtype: bool):
    vs, gs, grad_ws = (list(ts) for ts in zip(*(x.tensors() for x in xs), strict=True))
    dims, eps = [x.dim for x in xs], [x.bound(v) for x, v in zip(xs, vs, strict=True)]
    out_dtype = xs[0].out_dtype if one_dtype else None
    with wnkernel.use_backend("cpu"), threads(1):
        alone = [
            F.weight_norm(v, g, dim, eps=e, out_dtype=out_dtype)
            for v, g, dim, e in zip(vs, gs, dims, eps, strict=True)
        ]
        seeds = [t.to(w.dtype) for t, w in zip(grad_ws, alone, strict=True)]
        grads = grads_of(alone, vs, gs, seeds)
    for n in (1, 2, 5):
        with wnkernel.use_backend("cpu"), threads(n):
            together = F.weight_norms(vs, gs, dims, eps=eps, out_dtype=out_dtype)
            assert_same(together, alone)
            assert_same(grads_of(together, vs, gs, seeds), grads)


class Holder(nn.Module):
    """A weight that is nobody's layer."""

    def __init__(self, x: Weight) -> None:
        super().__init__()
        v, g, _ = x.tensors()
        eps = x.bound(v)
        self.weight = nn.Parameter(v.detach())
        wnkernel.weight_norm(self, dim=x.dim, eps=eps)
        held = self.parametrizations.weight
        with torch.no_grad():
            held.original0.copy_(g)
            held.original1.copy_(v)
        for p, need in zip((held.original1, held.original0), x.need, strict=True):
            p.requires_grad_(need)
        self.alone = lambda: F.weight_norm(held.original1, held.original0, x.dim, eps=eps)


@needs_cpu
@settings(max_examples=cases(200) // 4, deadline=None, derandomize=not cases(0))
@given(lists, st.data())
def test_fused_models_are_like_single_weights(xs: list[Weight], data: st.DataObject):
    model = nn.ModuleList(Holder(x) for x in xs)
    group = wnkernel.fuse(model)
    with wnkernel.use_backend("cpu"), group.scope():
        for _ in range(2):
            assert_same([m.weight for m in model], [m.alone() for m in model])
            changed = model[data.draw(st.integers(0, len(xs) - 1))].parametrizations.weight
            with torch.no_grad():
                (changed.original0 if data.draw(st.booleans()) else changed.original1).mul_(0.5)
    seeds = [torch.ones_like(m.weight) for m in model]
    pairs = [(h.original1, h.original0) for h in (m.parametrizations.weight for m in model)]
    vs, gs = zip(*pairs, strict=True)
    with wnkernel.use_backend("cpu"), group.scope():
        got = grads_of([m.weight for m in model], vs, gs, seeds)
        assert_same(got, grads_of([m.alone() for m in model], vs, gs, seeds))
