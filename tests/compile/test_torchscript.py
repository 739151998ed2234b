"""torch.jit: a trace holds the plain formula, and a script needs plain weights."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import wnkernel
from wnkernel import functional as F

from .. import reference
from ..cases import randn, randn_g
from ..exports import batch, folded, model, of_ours
from ..messages import message

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


def kinds_of_nodes(traced: torch.jit.ScriptModule) -> list[str]:
    return [node.kind() for node in traced.inlined_graph.nodes()]


def test_a_trace_has_no_operator_of_ours(route):
    m, x = model(), batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(m, (x,))
    assert of_ours(kinds_of_nodes(traced)) == []
    torch.testing.assert_close(traced(x), m(x))
    assert [k for k, _ in traced.named_parameters()] == [k for k, _ in m.named_parameters()]
    with torch.no_grad():
        for p in (*m.parameters(), *traced.parameters()):
            p.mul_(1.5)
    torch.testing.assert_close(traced(x), m(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dim", [0, 1, None])
def test_values_and_gradients_of_a_trace(dim, dtype):
    v, g, grad_w = randn((3, 4, 5), dtype), randn_g((3, 4, 5), dim, dtype), randn((3, 4, 5), dtype)
    v.requires_grad_(), g.requires_grad_()
    traced = torch.jit.trace(lambda v, g: F.weight_norm(v, g, dim), (v.detach(), g.detach()))
    w = traced(v, g)
    assert w.dtype == dtype
    reference.assert_close("w", w, reference.forward(v, g, dim))
    expected = reference.backward(v, g, grad_w, dim)
    for name, got, want in zip("vg", torch.autograd.grad(w, (v, g), grad_w), expected, strict=True):
        reference.assert_close(f"grad_{name}", got, want)


def test_lists_in_a_trace():
    v, g = (randn((4, 5)), randn((3, 2, 2))), (randn_g((4, 5), 0), randn_g((3, 2, 2), None))

    def lists(v0: Tensor, v1: Tensor, g0: Tensor, g1: Tensor) -> tuple[Tensor, ...]:
        return tuple(F.weight_norms([v0, v1], [g0, g1], [0, None]))

    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(lists, (*v, *g))
    assert of_ours([node.kind() for node in traced.graph.nodes()]) == []
    torch.testing.assert_close(list(traced(*v, *g)), F.weight_norms(v, g, [0, None]))


def test_bad_input_is_refused_in_a_trace():
    with pytest.raises(ValueError, match=message("g", r"shape \[4, 1\]", r"\[1, 1\]")):
        torch.jit.trace(F.weight_norm, (torch.ones(4, 3), torch.ones(1, 1)))
    assert not torch._C._is_tracing()


def test_the_tracer_goes_on_after_a_weight():
    """While arguments are checked it is off."""

    class TimesRows(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * x.shape[0]

    layer, x = wnkernel.weight_norm(TimesRows(5, 3)), torch.randn(7, 5)
    traced = torch.jit.trace(layer, (torch.ones(2, 5),))
    torch.testing.assert_close(traced(x), layer(x))


def test_a_fused_model_in_a_trace(launched):
    m, x = model(), batch()
    wnkernel.fuse(m, reuse="version")
    want = m(x)
    traced = torch.jit.trace(m, (x,))
    assert of_ours(kinds_of_nodes(traced)) == []
    torch.testing.assert_close(traced(x), want)
    assert launched[0] == 3


ADVICE = message("torch.jit.script", "plain weights", "a weight norm.*wnkernel.fold")


@pytest.mark.parametrize("make", [lambda: wnkernel.weight_norm(nn.Linear(5, 3)), model])
def test_a_script_is_refused_with_the_way_out(make):
    m = make()
    with pytest.raises(RuntimeError, match=ADVICE):
        torch.jit.script(m)
    plain = folded(m)
    x = torch.ones(2, 5) if isinstance(m, nn.Linear) else batch()
    assert torch.equal(torch.jit.script(plain)(x), m(x))


class Prepared(nn.Module):
    """Takes its weight norm away when it is scripted, as vocoders of voice conversion do."""

    def __init__(self, way: str, layer: nn.Module) -> None:
        super().__init__()
        self.way = way
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def __prepare_scriptable__(self) -> nn.Module:
        if self.way == "fold":
            wnkernel.fold(self)
        elif self.way == "parametrize":
            parametrize.remove_parametrizations(self.layer, "weight")
        else:
            for hook in list(self.layer._forward_pre_hooks.values()):
                if (
                    hook.__module__ == "torch.nn.utils.weight_norm"
                    and hook.__class__.__name__ == "WeightNorm"
                ):
                    nn.utils.remove_weight_norm(self.layer)
        return self


@pytest.mark.parametrize("way", ["fold", "parametrize", "hooks"])
def test_models_that_fold_when_they_are_scripted(way):
    m, x = Prepared(way, wnkernel.weight_norm(nn.Conv1d(2, 4, 3))), batch()
    want = m(x)
    torch.testing.assert_close(torch.jit.script(m)(x), want)
    assert not parametrize.is_parametrized(m.layer)
