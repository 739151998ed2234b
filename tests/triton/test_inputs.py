"""What a backward of the Triton backend reads: tensors as they are by then."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import wnkernel
from wnkernel import functional as F

from .. import reference
from ..cases import randn, randn_g
from ..messages import message
from .cases import DEVICE, case, fresh, needs_triton

pytestmark = needs_triton


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh(monkeypatch)


def replacements() -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "elsewhere": torch.clone,
        "in another order": lambda t: t.to(memory_format=torch.channels_last),
        "with gaps": lambda t: t.repeat_interleave(2, -1)[..., ::2],
        "negated": lambda t: torch._neg_view(-t),
    }


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("how", replacements())
def test_a_backward_reads_v_where_it_is_now(how, count):
    """Its ``.data`` was replaced since the forward, which no version counter shows."""
    cases = [case((6, 4, 3, 3), 0) for _ in range(count)]
    vs, gs = ([getattr(c, name).clone().requires_grad_() for c in cases] for name in ("v", "g"))
    grad_ws = [c.grad_w for c in cases]
    with wnkernel.use_backend("triton"):
        ws = F.weight_norms(vs, gs, [0] * count)
        want = torch.autograd.grad(ws, [*vs, *gs], grad_ws, retain_graph=True)
        old, vs[0].data = vs[0].data, replacements()[how](vs[0].data)
        old.fill_(torch.nan)
        got = torch.autograd.grad(ws, [*vs, *gs], grad_ws)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def restride(p: torch.nn.Parameter) -> None:
    """The same values in the same memory, in another order: neither the address nor the version of
    a parameter tells."""
    values = p.detach().contiguous().clone()
    p.data = values.new_empty(0).set_(p.untyped_storage(), 0, values.shape, values.stride())
    p.data.copy_(values)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["this thread", "another thread"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_backward_reads_v_as_it_is_now(count, elsewhere):
    """What a thread that has not seen the list learns of it is right, for whoever comes next."""
    shape, dims = (6, 4, 3, 3), [0] * count

    def parameters(of: Tensor) -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(of.clone(memory_format=torch.preserve_format)) for _ in dims]

    v = randn(shape).to(DEVICE, memory_format=torch.channels_last)
    g, grad_ws = randn_g(shape, 0).to(DEVICE), [randn(shape).to(DEVICE) for _ in dims]
    vs, gs = parameters(v), parameters(g)
    want = [reference.backward(v, g, grad_w, 0) for grad_w in grad_ws]

    def check(ws: list[Tensor], vs: list[torch.nn.Parameter]) -> None:
        grads = torch.autograd.grad(ws, vs, grad_ws)
        for got, (expected, _) in zip(grads, want, strict=True):
            reference.assert_close("grad_v", got, expected)

    def rest() -> None:
        with wnkernel.use_backend("triton"):
            check(ws, vs)
            others = parameters(v)
            check(F.weight_norms(others, gs, dims), others)

    with wnkernel.use_backend("triton"):
        ws = F.weight_norms(vs, gs, dims)
    address, version = vs[0].data_ptr(), vs[0]._version
    restride(vs[0])
    assert (vs[0].data_ptr(), vs[0]._version) == (address, version)
    if elsewhere:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(rest).result()
    else:
        rest()


@pytest.mark.parametrize("name", ["triton", "eager"])
@pytest.mark.parametrize("count", [1, 3])
def test_zeros_without_memory_are_zeros(name, count):
    """What autograd may send for a result that nothing depends on."""
    vs = [randn((5, 7)).to(DEVICE).requires_grad_() for _ in range(count)]
    gs = [randn_g((5, 7), 0).to(DEVICE).requires_grad_() for _ in range(count)]
    with wnkernel.use_backend(name):
        ws = F.weight_norms(vs, gs, [0] * count)
        zeros = [torch._efficientzerotensor(w.shape, device=DEVICE) for w in ws]
        assert not any(t.any() for t in torch.autograd.grad(ws, [*vs, *gs], zeros))


def test_memory_of_a_list_that_was_freed_is_an_error():
    """Also where its tables are kept."""
    vs = [randn((5, 7)).to(DEVICE).requires_grad_() for _ in range(2)]
    gs = [randn_g((5, 7), 0).to(DEVICE).requires_grad_() for _ in range(2)]
    with wnkernel.use_backend("triton"):
        for _ in range(3):
            ws = F.weight_norms(vs, gs, [0, 0])
            torch.autograd.grad(ws, vs, ws, retain_graph=True)
        vs[1].untyped_storage().resize_(0)  # as FSDP does
        for call in (
            lambda: F.weight_norms(vs, gs, [0, 0]),
            lambda: torch.autograd.grad(ws, vs, ws),
        ):
            with pytest.raises(RuntimeError, match=message("v", "with memory", "freed")):
                call()


def test_a_derivative_that_the_kernels_cannot_follow_is_no_wrong_one():
    """Forward mode through a backward: nothing may be lost without a word."""
    v, g = randn((4, 5)).to(DEVICE).requires_grad_(), randn_g((4, 5), 0).to(DEVICE)
    with wnkernel.use_backend("triton"), forward_ad.dual_level():
        w = F.weight_norm(v, g)
        grad_w = forward_ad.make_dual(torch.ones_like(w), torch.ones_like(w))
        with pytest.raises(NotImplementedError, match="jvp"):
            torch.autograd.grad(w, v, grad_w)
