"""w, the new v and all derivatives, against the formulas of EDM2 in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.utils import parametrize

from wnkernel import ForcedWeightNorm

from .. import reference
from ..cases import DTYPES, EMPTY_SHAPES, LAYOUTS, SHAPES, layout_dims, randn, shape_dims
from . import edm2
from .edm2 import EPS, MPConv, check, check_both, original, pair

F16, BF16, F32, F64 = DTYPES
both = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
all_dims = pytest.mark.parametrize("dim", [0, 1, 2, -2, None])
layers = pytest.mark.parametrize(("shape", "of_x"), edm2.SHAPES.values(), ids=edm2.SHAPES)

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "adam": partial(torch.optim.Adam, lr=0.01, betas=(0.9, 0.99)),
}

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


def step(layer: nn.Module, v: Tensor, x: Tensor, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The output, the v that it was computed with, its gradient and what the optimizer makes."""
    optimizer.zero_grad()
    y = layer(x)
    y.pow(3).mean().backward()
    seen = [y.detach().clone(), v.detach().clone(), v.grad.clone()]
    optimizer.step()
    return [*seen, v.detach().clone()]


# EDM2's layers


@layers
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_of_training(
    backend: str, shape: tuple[int, ...], of_x: tuple[int, ...], optimizer: str
) -> None:
    plain, ours = pair(*shape, gain=1.5)
    tensors = plain.weight, original(ours)
    optimizers = [OPTIMIZERS[optimizer]([v]) for v in tensors]
    for _ in range(5):
        x = torch.randn(of_x, dtype=F64)
        want, got = map(step, (plain, ours), tensors, (x, x), optimizers)
        close(got, want)
    for layer in (plain, ours):
        layer.eval()
    close(ours(x), plain(x))
    close(*tensors)


@layers
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_training_in_lower_precision(
    backend: str, shape: tuple[int, ...], of_x: tuple[int, ...], dtype: torch.dtype
) -> None:
    plain, ours = pair(*shape, dtype=dtype)
    plain.double()
    tensors = plain.weight, original(ours)
    optimizers = [OPTIMIZERS["sgd"]([v]) for v in tensors]
    for _ in range(3):
        x = torch.randn(of_x, dtype=F64).to(dtype)
        want, got = map(step, (plain, ours), tensors, (x.double(), x), optimizers)
        bound = 30 * torch.finfo(dtype).eps
        for a, b in zip(got, want, strict=True):
            assert a.dtype == dtype
            torch.testing.assert_close(a.double(), b, rtol=bound, atol=bound * float(b.abs().max()))


@layers
def test_evaluation_is_that_of_folded_layers(
    backend: str, shape: tuple[int, ...], of_x: tuple[int, ...]
) -> None:
    """MMAudio's autoencoder folds its weights before inference: w takes the place of v."""
    plain, ours = (layer.eval() for layer in pair(*shape))
    x = torch.randn(of_x, dtype=F64)
    before = plain.weight.detach().clone()
    close(ours(x), plain(x))
    assert torch.equal(original(ours), before)
    y = ours(x)
    parametrize.remove_parametrizations(ours, "weight")
    close(ours.weight, edm2.weight(before))
    assert torch.equal(ours(x), y)


def test_defaults_are_those_of_edm2(backend: str) -> None:
    v = randn((5, 7), F64)
    want = edm2.expected(v, 0, 1.0, 1e-4)
    reference.assert_close("w", ForcedWeightNorm()(v), want.w)
    reference.assert_close("v", v, want.v)
    assert ForcedWeightNorm().extra_repr() == "dim=0, gain=1.0, eps=0.0001"


@all_dims
def test_the_root_mean_square_is_one_less_eps(backend: str, dim: int | None) -> None:
    """The fixed point of x / (x + eps), of which the first call is half of eps^2 away."""
    v = randn((4, 5, 6), F64)
    norm = ForcedWeightNorm(dim)
    for _ in range(2):
        norm(v)
    rms = reference.norm(v, dim) / math.sqrt(reference.length(v, dim))
    torch.testing.assert_close(rms, torch.full_like(rms, 1 - EPS), rtol=0, atol=1e-7)
    before = v.clone()
    norm(v)
    torch.testing.assert_close(v, before, rtol=1e-7, atol=0)


# Shapes, dims, dtypes, memory orders


@pytest.mark.parametrize(("shape", "dim"), shape_dims(SHAPES))
def test_shapes(backend: str, shape: tuple[int, ...], dim: int | None) -> None:
    for dtype in DTYPES:
        check_both(randn(shape, dtype), dim, 1.25)


@both
@pytest.mark.parametrize(("shape", "dim"), shape_dims(EMPTY_SHAPES))
def test_empty(backend: str, shape: tuple[int, ...], dim: int | None, training: bool) -> None:
    v = randn(shape).requires_grad_()
    w = ForcedWeightNorm(dim).train(training)(v)
    w.backward(randn(shape))
    assert w.shape == v.grad.shape == v.shape


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize(
    ("layout", "dim"), layout_dims([name for name in LAYOUTS if name != "expanded"])
)
def test_layouts(backend: str, layout: str, dim: int | None, dtype: torch.dtype) -> None:
    shape = LAYOUTS[layout]
    for grad_w in (randn(shape, dtype), randn(shape, dtype, layout)):
        check_both(randn(shape, dtype, layout), dim, 0.75, grad_w=grad_w)


def test_what_lies_between_the_rows_stays(backend: str) -> None:
    wide = randn((6, 2 * 5))
    before = wide.clone()
    ForcedWeightNorm()(wide[1:4, ::2])
    changed = wide != before
    assert changed[1:4, ::2].all()
    assert changed.sum() == 15


def test_overlapping_elements_cannot_be_written(backend: str) -> None:
    with pytest.raises(ValueError, match=r"^v: expected a tensor whose elements do not share mem"):
        ForcedWeightNorm()(randn((1, 4)).expand(3, 4))
    v = randn((1, 4)).expand(3, 4)
    want = edm2.expected(v, 0, training=False).w
    reference.assert_close("w", ForcedWeightNorm().eval()(v), want)


LONG = {
    "runs": ((2, 70_001), 0),  # rows of over 65,536 elements: two phases on the CPU
    "whole": ((3, 2, 20_011), None),
    "separate runs": ((3, 2, 30_000), -2),  # a row lies in three places
    "strips": ((300, 9, 2), -2),  # rows of many short runs
    "long strips": ((70_001, 3), 1),  # the same in two phases
    "many short rows": ((40_000, 3), 0),
}
"""Long rows: a shape and a dim."""


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize(("shape", "dim"), LONG.values(), ids=LONG)
def test_long_rows(
    backend: str, shape: tuple[int, ...], dim: int | None, dtype: torch.dtype
) -> None:
    check_both(randn(shape, dtype), dim)


# gain and eps


@all_dims
def test_gain(backend: str, dim: int | None) -> None:
    for gain, dtype in itertools.product([0.0, -2.0, 3, 1e-3, 1e4], [F32, F64]):
        check_both(randn((4, 5, 6), dtype), dim, gain)


@both
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_gain_is_not_rounded(backend: str, dtype: torch.dtype, training: bool) -> None:
    """The mean of many elements is more exact than each, and shows factors that they share."""
    v = randn((4, 2048), dtype)
    want = edm2.expected(v, 0, 1.3, training=training).w.value
    w = ForcedWeightNorm(gain=1.3).train(training)(v).double()
    slope = (w * want).sum() / want.square().sum()
    assert slope.item() == pytest.approx(1, abs=1e-4)


@all_dims
def test_eps(backend: str, dim: int | None) -> None:
    for eps, dtype in itertools.product([0.0, 0, 1e-8, 0.125, 3, 50.0], [BF16, F32, F64]):
        check_both(randn((4, 5, 6), dtype), dim, 2.0, eps)


def test_eps_is_added_to_the_mean_square_not_to_the_norm(backend: str) -> None:
    """The equations have it at the norm, the algorithm and the authors' code do not."""
    v = torch.full((2, 100), 0.01, dtype=F64)
    w = ForcedWeightNorm(eps=1e-4).eval()(v)
    close(w, torch.full_like(w, 0.01 / 0.0101 / 10))


# Ends of the range


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@all_dims
def test_zero_rows(backend: str, dim: int | None, dtype: torch.dtype) -> None:
    v = randn((4, 5, 6), dtype)
    row = v if dim is None else v.select(dim, 2)
    row.zero_()
    eps = 0.125 if dtype == F16 else EPS  # gradients over eps leave float16
    found = check_both(v, dim, 2.0, eps)
    assert all(grad.isfinite().all() for grad in found)
    assert (row == 0).all()


def test_zero_rows_without_eps_stay_in_training(backend: str) -> None:
    """And spoil no other."""
    v = randn((4, 6))
    v[2] = 0
    v.requires_grad_()
    want = edm2.expected(v[[0, 1, 3]], 0, eps=0.0)
    w = ForcedWeightNorm(eps=0.0)(v)
    assert not w[2].any()
    assert not v[2].any()
    reference.assert_close("w", w[[0, 1, 3]], want.w)
    reference.assert_close("v", v[[0, 1, 3]], want.v)
    w.sum().backward()
    assert v.grad[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("eps", [EPS, 0.0])
@all_dims
def test_extreme_rows(backend: str, dim: int | None, eps: float) -> None:
    for size in (1e30, 1e-30, 1e37, 1e-37):
        v = randn((4, 5, 6)).div_(3)
        (v if dim is None else v.select(dim, 2)).mul_(size)
        # Without eps, eager follows torch's fused kernel in evaluation, whose squares leave the
        # range. In training both compute new rows, which are as large as any.
        (check if backend == "eager" and not eps else check_both)(v, dim, 1.0, eps)


def test_rows_of_all_sizes_in_float64(backend: str) -> None:
    v = randn((7, 9), F64)
    v *= torch.tensor([1e-150, 1e-100, 1e-10, 1, 1e10, 1e100, 1e150], dtype=F64)[:, None]
    check_both(v, 0)


@both
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_nan_and_inf_spoil_one_row_only(
    backend: str, dtype: torch.dtype, bad: float, training: bool
) -> None:
    v = randn((4, 6), dtype)
    v[1, 3] = bad
    before = v.clone()
    v.requires_grad_()
    w = ForcedWeightNorm().train(training)(v)
    want = edm2.expected(before, 0, training=training)
    others = [0, 2, 3]
    for name, got, of in (("w", w, want.w), ("v", v, want.v)):
        assert torch.equal(got.isnan(), of.value.isnan()), name
        cut = reference.Expected(of.value[others], of.scale[others], of.length, of.acc_dtype)
        reference.assert_close(name, got[others], cut)
    (grad,) = torch.autograd.grad(w, v, torch.ones_like(w))
    assert grad[1].isnan().all()
    assert grad[others].isfinite().all()


# Derivatives


def formula(dim: int | None, gain: float = 1.5, eps: float = 0.25) -> Callable[[Tensor], Tensor]:
    return lambda v: edm2.weight(v, dim, gain, eps)


def ours(dim: int | None, gain: float = 1.5, eps: float = 0.25) -> ForcedWeightNorm:
    return ForcedWeightNorm(dim, gain, eps=eps).eval()


@pytest.mark.parametrize("eps", [0.0, 0.25])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@all_dims
def test_gradcheck(backend: str, dim: int | None, layout: str, eps: float) -> None:
    v = randn((3, 4, 2), F64, layout).requires_grad_()
    for numerical_check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert numerical_check(ours(dim, eps=eps), (v,))


@all_dims
def test_gradcheck_in_training(backend: str, dim: int | None) -> None:
    """Differences of w see the write as well, whose derivative is the projection that the gradient
    has already if rms(v) is 1 and eps 0: then, and only then, both agree."""
    norm = ForcedWeightNorm(dim, 1.5, eps=0.0)
    v = edm2.normalized(randn((3, 4, 2), F64), dim, 0.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: norm(v.clone()), (v,))


@both
@pytest.mark.parametrize("eps", [0.0, 0.25])
@all_dims
def test_second_derivatives(backend: str, dim: int | None, eps: float, training: bool) -> None:
    """Those of w with respect to the v that is there after the call."""
    v = randn((4, 5, 6), F64).requires_grad_()
    if eps:
        with torch.no_grad():
            (v if dim is None else v.select(dim, 1)).mul_(0.1)  # where eps counts most
    grad_w, along = (randn((4, 5, 6), F64) for _ in range(2))
    grad_w.requires_grad_()
    w = ForcedWeightNorm(dim, 1.5, eps=eps).train(training)(v)
    now = v.detach().clone().requires_grad_()
    wanted = formula(dim, eps=eps)(now)

    def second(w: Tensor, v: Tensor) -> list[Tensor]:
        (first,) = torch.autograd.grad(w, v, grad_w, create_graph=True)
        return [first, *torch.autograd.grad(first, (v, grad_w), along, create_graph=True)]

    got, want = second(w, v), second(wanted, now)
    close(got, want)
    third = [torch.autograd.grad(t[1].square().sum(), u)[0] for t, u in ((got, v), (want, now))]
    torch.testing.assert_close(*third, rtol=1e-8, atol=1e-10)


def test_second_derivatives_in_float32(backend: str) -> None:
    v = randn((6, 40)).requires_grad_()
    w = ForcedWeightNorm()(v)
    now = v.detach().double().requires_grad_()
    penalties = []
    for out, leaf in ((w, v), (edm2.weight(now), now)):
        (first,) = torch.autograd.grad(out.pow(3).sum(), leaf, create_graph=True)
        penalties.append(torch.autograd.grad(first.square().sum(), leaf)[0])
    torch.testing.assert_close(penalties[0].double(), penalties[1], rtol=1e-4, atol=1e-7)


def test_second_derivatives_at_a_row_of_zeros(backend: str) -> None:
    v = randn((3, 4), F64)
    v[1] = 0
    v.requires_grad_()
    (first,) = torch.autograd.grad(ours(0)(v).pow(2).sum(), v, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), v)
    assert second.isfinite().all()


@all_dims
def test_transforms(backend: str, dim: int | None) -> None:
    v, dv, grad_w = (randn((3, 4, 5), F64) for _ in range(3))
    f, g = ours(dim), formula(dim)
    before = v.clone()
    close(jacrev(f)(v), jacrev(g)(v))
    close(jacfwd(f)(v), jacfwd(g)(v))
    close(jvp(f, (v,), (dv,)), jvp(g, (v,), (dv,)))
    close(vjp(f, v)[1](grad_w), vjp(g, v)[1](grad_w))

    def slope(h: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return grad(lambda v: h(v).pow(3).sum())

    close(jvp(slope(f), (v,), (dv,)), jvp(slope(g), (v,), (dv,)))
    close(grad(lambda v: (slope(f)(v) * dv).sum())(v), grad(lambda v: (slope(g)(v) * dv).sum())(v))
    many = randn((6, 3, 4, 5), F64)
    close(vmap(f)(many), torch.stack([g(one) for one in many]))
    close(vmap(slope(f))(many), torch.stack([slope(g)(one) for one in many]))
    assert torch.equal(v, before)


def test_per_sample_gradients(backend: str) -> None:
    plain, layer = (layer.eval() for layer in pair(4, 5))
    x = torch.randn(6, 5, dtype=F64)

    def each(layer: nn.Module) -> Tensor:
        def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(layer, parameters, x[None]).pow(3).sum()

        (found,) = vmap(grad(loss), (None, 0))(dict(layer.named_parameters()), x).values()
        return found

    close(each(layer), each(plain))


def test_another_v_in_a_functional_call_is_the_one_that_is_written(backend: str) -> None:
    plain, layer = pair(4, 5)
    x = torch.randn(6, 5, dtype=F64)
    before = original(layer).detach().clone()
    results = []
    for m, key in ((plain, "weight"), (layer, "parametrizations.weight.original")):
        v = torch.linspace(-2, 3, 20, dtype=F64).view(4, 5)
        results.append([functional_call(m, {key: v}, x), v])
    close(results[1], results[0])
    assert torch.equal(original(layer), before)


def test_v_may_have_a_history(backend: str) -> None:
    """As where a layer is made from another tensor; the write is no part of it."""
    leaf = randn((4, 5), F64).requires_grad_()
    v = leaf * 2
    w = ForcedWeightNorm()(v)
    grad_w = torch.randn_like(w)
    (got,) = torch.autograd.grad(w, leaf, grad_w)
    close(got, 2 * edm2.expected_gradient(v, grad_w, 0).value)


def test_gradients_of_frozen_weights(backend: str) -> None:
    """They are forced as others are."""
    plain, layer = pair(4, 5)
    for m in (plain, layer):
        m.requires_grad_(False)
    x = torch.randn(6, 5, dtype=F64, requires_grad=True)
    (want,) = torch.autograd.grad(plain(x).pow(3).sum(), x)
    (got,) = torch.autograd.grad(layer(x).pow(3).sum(), x)
    close(got, want)
    close(original(layer), plain.weight)


@pytest.mark.parametrize("when", ["backward", "second backward"])
def test_a_change_before_a_backward_raises(backend: str, when: str) -> None:
    v = randn((4, 5)).requires_grad_()
    w = ForcedWeightNorm()(v)
    changed = w
    if when == "second backward":
        (changed,) = torch.autograd.grad(w.pow(3).sum(), v, create_graph=True)
    with torch.no_grad():
        v.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        changed.sum().backward()


def test_the_formulas_are_their_own_witness() -> None:
    """A row of 3, 4 and 12 zeros and its numbers by hand, for the helper of this folder."""
    v = torch.zeros(1, 14, dtype=F64)
    v[0, :2] = torch.tensor([3.0, 4.0])
    plain = MPConv(1, 14).double()
    plain.weight.data = v.clone()
    plain(v)
    rms = 5 / math.sqrt(14)
    close(plain.weight, (v / (rms + 1e-4)))
    new = rms / (rms + 1e-4)
    close(edm2.weight(plain.weight)[0, 0], v[0, 0] / (rms + 1e-4) / (new + 1e-4) / math.sqrt(14))
