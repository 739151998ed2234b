"""``functional.weight_norms``: many weights in one launch and one autograd node."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode

from wnkernel import functional as F

from ..cases import randn_g
from ..messages import message
from ..reference import assert_close, forward

# (shape, dim, dtype of v, dtype of g, eps)
WEIGHTS = [
    ((6, 4, 3), 0, torch.float32, torch.float32, 0.0),
    ((5, 7), 1, torch.bfloat16, torch.float32, 0.0),
    ((3, 4, 5), None, torch.float64, torch.float64, 0.5),
    ((40, 512), 0, torch.float32, torch.float32, 1e-6),
    ((4, 6, 2), 1, torch.float16, torch.float16, 0.0),
]


def weights(grad: bool = True):
    """Lists of v, g, dim and eps."""
    vs = [torch.randn(shape).to(dtype) for shape, _, dtype, _, _ in WEIGHTS]
    gs = [randn_g(shape, dim, dtype) for shape, dim, _, dtype, _ in WEIGHTS]
    for t in (*vs, *gs):
        t.requires_grad_(grad)
    return vs, gs, [dim for _, dim, _, _, _ in WEIGHTS], [eps for *_, eps in WEIGHTS]


@pytest.mark.parametrize("out_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("grad", [False, True])
def test_bits_are_those_of_single_weights(route, grad, out_dtype):
    vs, gs, dims, eps = weights(grad)
    ws = F.weight_norms(vs, gs, dims, eps=eps, out_dtype=out_dtype)
    singles = [
        F.weight_norm(v, g, dim, eps=e, out_dtype=out_dtype)
        for v, g, dim, e in zip(vs, gs, dims, eps, strict=True)
    ]
    for w, single in zip(ws, singles, strict=True):
        assert w.dtype == single.dtype
        assert torch.equal(w, single)
    if grad:
        assert len({w.grad_fn for w in ws}) == 1
        seeds = [torch.randn_like(w) for w in ws]
        for got, want in zip(
            torch.autograd.grad(ws, [*vs, *gs], seeds),
            torch.autograd.grad(singles, [*vs, *gs], seeds),
            strict=True,
        ):
            assert torch.equal(got, want)


def test_lists_that_change_before_the_backward(route):
    vs, gs, dims, _ = weights()
    inputs = [*vs, *gs]
    want = torch.autograd.grad(
        sum(w.sum().float() for w in F.weight_norms(*weights_of(inputs))), inputs
    )
    ws = F.weight_norms(vs, gs, dims)
    for entries in (vs, gs, dims):
        entries.reverse()
        entries.pop()
    got = torch.autograd.grad(sum(w.sum().float() for w in ws), inputs)
    assert all(map(torch.equal, got, want))


def weights_of(inputs):
    half = len(inputs) // 2
    return inputs[:half], inputs[half:], [dim for _, dim, *_ in WEIGHTS]


def test_eps_is_zero_by_default(route):
    vs, gs, dims, _ = weights(grad=False)
    for w, v, g, dim in zip(F.weight_norms(vs, gs, dims), vs, gs, dims, strict=True):
        assert_close("w", w, forward(v, g, dim))


def test_no_weights(route):
    assert F.weight_norms([], [], []) == []


def test_frozen_weights_stay_frozen(route):
    vs, gs, dims, eps = weights()
    vs[0].requires_grad_(False)
    gs[0].requires_grad_(False)
    vs[1].requires_grad_(False)
    ws = F.weight_norms(vs, gs, dims, eps=eps)
    assert [w.requires_grad for w in ws] == [False, True, True, True, True]
    sum(w.float().square().sum() for w in ws).backward()
    assert vs[0].grad is gs[0].grad is vs[1].grad is None
    assert gs[1].grad is not None


def test_unused_weights_get_no_gradient(route):
    vs, gs, dims, eps = weights()
    F.weight_norms(vs, gs, dims, eps=eps)[2].sum().backward()
    assert [v.grad is None for v in vs] == [True, True, False, True, True]
    assert [g.grad is None for g in gs] == [True, True, False, True, True]


def test_a_function_mode_sees_one_call(route):
    class Count(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.calls += func is F.weight_norms
            return func(*args, **(kwargs or {}))

    vs, gs, dims, eps = weights()
    with Count() as count:
        ws = F.weight_norms(vs, gs, dims, eps=eps)
    assert count.calls == 1
    assert len({w.grad_fn for w in ws}) == 1


def test_transforms_go_through(route):
    vs, gs, dims, eps = weights(grad=False)
    batched = [torch.stack([v, 2 * v]) for v in vs]
    got = torch.vmap(lambda v: tuple(F.weight_norms(list(v), gs, dims, eps=eps)))(tuple(batched))
    for w, v, g, dim, e in zip(got, vs, gs, dims, eps, strict=True):
        assert_close("w", w[1], forward(2 * v, g, dim, e))


@pytest.mark.parametrize("name", ["g", "dim", "eps"])
def test_lists_of_different_lengths(route, name):
    vs, gs, dims, eps = weights()
    lists = {"g": gs, "dim": dims, "eps": eps}
    lists[name] = lists[name][:-1]
    with pytest.raises(ValueError, match=message(name, "5 entries", "4")):
        F.weight_norms(vs, **lists)


def test_weights_on_two_devices():
    vs, gs, dims, eps = weights(grad=False)
    vs[1], gs[1] = vs[1].to("meta"), gs[1].to("meta")
    here = vs[0].device
    with pytest.raises(ValueError, match=f"^v: expected all on {here}, entry 1 is on meta$"):
        F.weight_norms(vs, gs, dims, eps=eps)


def test_one_bad_weight_is_named(route):
    vs, gs, dims, eps = weights()
    gs[3] = torch.ones(3, 1)
    with pytest.raises(ValueError, match=message("g", r"\[40, 1\]", r"\[3, 1\]")):
        F.weight_norms(vs, gs, dims, eps=eps)


def test_memory_that_was_freed_is_an_error(compiled_backend):
    v, g = torch.randn(40, 512, requires_grad=True), torch.ones(40, 1)
    w = F.weight_norm(v, g)
    v.untyped_storage().resize_(0)  # as FSDP does
    with pytest.raises(RuntimeError, match=message("v", "with memory", "freed")):
        F.weight_norm(v, g)
    with pytest.raises(RuntimeError, match=message("v", "with memory", "freed")):
        w.sum().backward()
