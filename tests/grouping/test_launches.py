"""One launch and one autograd node for each bucket and mode, with the bits of single weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import wnkernel
from wnkernel.backends import AUTO, BACKENDS
from wnkernel.backends.compiled import CompiledBackend

from .. import reference
from ..cases import DTYPES, randn_g
from ..groups import both_modes, twins, weights
from ..messages import here


@dataclass
class Launches:
    forward: int = 0
    backward: int = 0


@contextmanager
def counted(route: str) -> Iterator[Launches]:
    """How often the lists of a backend are computed within the block."""
    found = Launches()
    if route == AUTO or isinstance(BACKENDS[route], CompiledBackend):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            yield found
        counts = {event.key: event.count for event in profiler.key_averages()}
        for name in ("forward", "backward"):
            operators = f"wnkernel::{name}", f"wnkernel::{name}_one"
            setattr(found, name, sum(counts.get(operator, 0) for operator in operators))
        return
    with pytest.MonkeyPatch.context() as patch:
        for name, method in (("forward", "weights"), ("backward", "gradients")):
            counting = _counting(getattr(BACKENDS[route], method), name, found)
            patch.setattr(BACKENDS[route], method, counting)
        yield found


def _counting(original: Callable[..., object], name: str, found: Launches) -> Callable[..., object]:
    def call(*args: object) -> object:
        setattr(found, name, getattr(found, name) + 1)
        return original(*args)

    return call


class Bag(nn.Module):
    """Weights of any shape, dim and dtypes, alone: ``(shape, dim, v dtype, g dtype)``."""

    def __init__(self, *specs: Sequence) -> None:
        super().__init__()
        for k, (shape, dim, *dtypes) in enumerate(specs):
            v_dtype, g_dtype = dtypes or (torch.float32, torch.float32)
            layer = nn.Module()
            layer.weight = nn.Parameter(torch.randn(shape, dtype=torch.float64).to(v_dtype))
            wnkernel.weight_norm(layer, dim=dim)
            g = layer.parametrizations.weight.original0
            g.data = randn_g(shape, dim, g_dtype)
            self.add_module(str(k), layer)

    def forward(self) -> list[Tensor]:
        return [layer.weight for layer in self.children()]


MIXED = [
    *[(shape, dim) for shape in [(7, 5, 3), (32, 16)] for dim in (0, 1, -1, None)],
    *[((4, 6, 5), dim, dtype, dtype) for dtype in DTYPES for dim in (0, 1, 2, None)],
    *[((4, 6, 5), 0, torch.bfloat16, dtype) for dtype in DTYPES],
    *[((4, 6, 5), 1, dtype, torch.float32) for dtype in DTYPES],
    ((0, 3), 0),
    ((3, 0), 0),
    ((40, 700), 0),  # recycled memory
]

REAL = [
    ((512, 80, 7), 0),
    ((256, 128, 8), 0),  # ConvTranspose1d, SpeechT5HifiGan
    ((1, 32, 7), 0),
    ((128, 64, 8), 0),
    ((768, 48, 128), 2),  # wav2vec2's positional convolution
    ((8, 1024, 1), 0),
    ((1024, 8, 1), 0),  # DAC's codebook projections
    ((1024, 1024, 5, 1), 0),  # MPD
    ((128, 16, 41), 0),  # MSD, grouped
    ((4096, 256), 0),  # DINO's last layer
]


def backward(ws: Sequence[Tensor]) -> None:
    """Gradients that differ from weight to weight and are the same in every call."""
    torch.manual_seed(1)
    torch.autograd.backward(ws, [torch.randn_like(w) for w in ws])


def assert_one_launch(model: nn.Module, route: str) -> None:
    with counted(route) as launches:
        model().sum().backward()
    assert (launches.forward, launches.backward) == (1, 1)


@both_modes
def test_one_launch_each_way(route, reuse):
    model, twin, group = twins(reuse)
    for _ in range(3):
        assert_one_launch(model, route)
        group.refresh()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(AssertionError, match=r"\(7, 7\) == \(1, 1\)"):
        assert_one_launch(twin, route)


@both_modes
def test_one_node(route, reuse):
    model, twin, group = twins(reuse)
    with group.scope():
        assert len({w.grad_fn for w in weights(model).values()}) == 1
    assert len({w.grad_fn for w in weights(twin).values()}) == 7


@both_modes
def test_modes_have_a_launch_each(route, reuse):
    model, _, group = twins(reuse)
    with counted(route) as launches, group.scope():
        for _ in range(2):
            model()
            with torch.no_grad():
                model()
                assert not any(w.requires_grad for w in weights(model).values())
            with torch.inference_mode():
                model()
                assert not any(w.requires_grad for w in weights(model).values())
            assert len({w.grad_fn for w in weights(model).values()}) == 1
    assert (launches.forward, launches.backward) == (3, 0)


def test_mixed_shapes_dims_and_dtypes_are_one_launch(route):
    model, twin, _ = twins(build=lambda: Bag(*MIXED))
    with counted(route) as launches:
        backward(model())
    assert (launches.forward, launches.backward) == (1, 1)
    with counted(route) as launches:
        backward(twin())
    assert (launches.forward, launches.backward) == (len(MIXED), len(MIXED))


@both_modes
@pytest.mark.parametrize("specs", [MIXED, REAL], ids=["mixed", "real"])
def test_the_bits_are_those_of_single_weights(route, specs, reuse):
    model, twin, _ = twins(reuse, build=lambda: Bag(*specs))
    ws, want = model(), twin()
    for w, expected in zip(ws, want, strict=True):
        assert w.dtype == expected.dtype
        assert torch.equal(w, expected)
    backward(ws)
    backward(want)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.grad.dtype == q.grad.dtype
        assert torch.equal(p.grad, q.grad), list(p.shape)


def test_the_bits_are_those_of_single_weights_whoever_is_left_out(route):
    model, twin, _ = twins(build=lambda: Bag(*MIXED))
    for some in (slice(None), slice(None, None, 3), slice(5, 6), slice(1, None, 2)):
        for module in (model, twin):
            module.zero_grad()
            backward(module()[some])
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            assert p.grad is None or torch.equal(p.grad, q.grad)


def test_weights_used_twice_stay_within_the_tolerances(route):
    """g of the dtype of v: gradients of w add up in that."""
    same_dtypes = [(shape, dim, *d) for shape, dim, *d in MIXED if len({*d}) < 2 and 0 not in shape]
    model = Bag(*same_dtypes)
    group = wnkernel.fuse(model)
    with group.scope():
        first, second = model(), model()
    assert all(a is b for a, b in zip(first, second, strict=True))
    grads = [[torch.randn_like(w) for w in first] for _ in range(2)]
    loss = sum(
        (w * grad).sum(dtype=torch.float64)
        for ws, of_use in zip((first, second), grads, strict=True)
        for w, grad in zip(ws, of_use, strict=True)
    )
    loss.backward()
    for layer, one, other in zip(model.children(), *grads, strict=True):
        g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
        dim = layer.parametrizations.weight[0].dim
        both = one.to(torch.float64) + other.to(torch.float64)
        for p, expected in zip((v, g), reference.backward(v, g, both, dim), strict=True):
            reference.assert_close("gradient", p.grad, expected)


# Buckets

KIB = 1 / 1024
BUCKETS = {
    "none": ([16] * 5, None, [[0, 1, 2, 3, 4]]),
    "all fit": ([16] * 5, 80 * KIB, [[0, 1, 2, 3, 4]]),
    "one too many": ([16] * 5, 79 * KIB, [[0], [1, 2, 3, 4]]),
    "filled from the end": ([16] * 5, 32 * KIB, [[0], [1, 2], [3, 4]]),
    "between two sizes": ([16] * 5, 47.5 * KIB, [[0], [1, 2], [3, 4]]),
    "oversize": ([16, 16, 64, 16, 16], 32 * KIB, [[0, 1], [2], [3, 4]]),
    "oversize first": ([64, 16, 16], 32 * KIB, [[0], [1, 2]]),
    "oversize last": ([16, 16, 64], 32 * KIB, [[0, 1], [2]]),
    "all oversize": ([16] * 3, 1e-9, [[0], [1], [2]]),
    "whole number": ([16] * 3, 1, [[0, 1, 2]]),
}
"""Sizes of v in KiB, cap in MiB, and the members of each bucket."""


def sized(sizes: Sequence[int]) -> Bag:
    return Bag(*[((4 * kib, 64), 0) for kib in sizes])


@both_modes
@pytest.mark.parametrize("case", BUCKETS)
def test_buckets(route, case, reuse):
    sizes, cap, buckets = BUCKETS[case]
    model, twin, _ = twins(reuse, build=lambda: sized(sizes), bucket_cap_mb=cap)
    with counted(route) as launches:
        ws = model()
        backward(ws)
    assert (launches.forward, launches.backward) == (len(buckets), len(buckets))
    by_node: dict[object, list[int]] = {}
    for k, w in enumerate(ws):
        by_node.setdefault(w.grad_fn, []).append(k)
    assert list(by_node.values()) == buckets
    want = twin()
    backward(want)
    assert all(torch.equal(w, x) for w, x in zip(ws, want, strict=True))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize(("cap", "early"), [(32 * KIB, {2, 3}), (None, set())], ids=str)
def test_gradients_of_the_last_bucket_come_before_the_backward_is_done(route, cap, early):
    """What DistributedDataParallel overlaps with communication."""
    layers = [wnkernel.weight_norm(nn.Linear(64, 64)) for _ in range(4)]
    model = nn.Sequential(*layers)
    wnkernel.fuse(model, bucket_cap_mb=cap)
    done: set[int] = set()
    seen: list[set[int]] = []
    for k, layer in enumerate(layers):
        v = layer.parametrizations.weight.original1
        v.register_post_accumulate_grad_hook(lambda _, k=k: done.add(k))
    layers[0].register_forward_hook(
        lambda module, args, y: y.register_hook(lambda _: seen.append(set(done))) and None
    )
    model(torch.randn(2, 64)).sum().backward()
    assert seen == [early]
    assert done == {0, 1, 2, 3}


@both_modes
def test_a_member_on_another_device_has_a_launch_of_its_own(route, reuse):
    if route not in (AUTO, "eager"):
        pytest.skip("a compiled backend that was asked for takes its own device only")

    def build() -> nn.Module:
        model = Bag(*[((6, 5), 0)] * 5)
        model.get_submodule("1").to("meta")
        model.get_submodule("3").to("meta")
        return model

    model, twin, _ = twins(reuse, build=build)
    for _ in range(2):
        ws, want = model(), twin()
        assert [w.device.type for w in ws] == [
            here().type,
            "meta",
            here().type,
            "meta",
            here().type,
        ]
        assert len({w.grad_fn for w in ws[::2]}) == len({w.grad_fn for w in ws[1::2]}) == 1
        assert ws[0].grad_fn is not ws[1].grad_fn
        for results in (ws, want):
            backward(results)
        for a, b in zip(ws[::2], want[::2], strict=True):
            assert torch.equal(a, b)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert p.grad.device == q.grad.device
            assert p.is_meta or torch.equal(p.grad, q.grad)
