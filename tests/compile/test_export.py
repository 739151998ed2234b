"""torch.export: programs hold the plain formula and nothing that needs this package."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import wnkernel
from wnkernel import functional as F

from .. import reference
from ..cases import randn, randn_g
from ..exports import batch, folded, model, of_ours, operators
from ..layers import legacy_weight_norm
from ..messages import message
from ..processes import PATIENCE_S
from ..versions import layers_in_graphs, needs, since

PLAIN = ["mul.Tensor", "sum.dim_IntList", "sqrt.default", "div.Tensor", "mul.Tensor"]
"""One weight norm."""

both_ways = pytest.mark.parametrize("strict", [False, True])
with_hooks = pytest.mark.parametrize(
    "strict", [False, pytest.param(True, marks=needs("strict export of hooks"))]
)
of_rnns = pytest.mark.parametrize(
    "strict", [pytest.param(False, marks=needs("export of RNNs")), True]
)
with_messages = pytest.mark.parametrize(
    "strict",
    [
        False,
        pytest.param(True, marks=since("2.9", "Dynamo of torch 2.8 keeps messages to itself")),
    ],
)


class Function(nn.Module):
    """Of tensors that are inputs of the program."""

    def __init__(self, dim: int | None = 0, **options: object) -> None:
        super().__init__()
        self.dim = dim
        self.options = options

    def forward(self, v: Tensor, g: Tensor) -> Tensor:
        return F.weight_norm(v, g, self.dim, **self.options)


def exported(dim: int | None, v: Tensor, g: Tensor, **options: object) -> Tensor:
    program = torch.export.export(Function(dim, **options), (v, g), strict=False)
    assert of_ours(operators(program)) == []
    return program.module()(v, g)


def test_the_program_has_no_operator_of_ours(route):
    assert_none_of_ours(strict=False)


def test_a_program_by_dynamo_has_no_operator_of_ours():
    assert_none_of_ours(strict=True)


def assert_none_of_ours(strict: bool) -> None:
    m, x = model(), batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)  # torch's, of its own functions
        warnings.filterwarnings("ignore", message="Guards may run slower on Python 3.13.0")
        program = torch.export.export(m, (x,), strict=strict)
    assert of_ours(operators(program)) == []
    assert of_ours(operators(program.run_decompositions())) == []
    assert set(program.state_dict) == set(m.state_dict())
    assert set(program.graph_signature.parameters) == {k for k, _ in m.named_parameters()}
    torch.testing.assert_close(program.module()(x), m(x))


@both_ways
def test_five_operators_for_a_weight(strict):
    layer = wnkernel.weight_norm(nn.Linear(5, 3))
    names = operators(torch.export.export(layer, (torch.ones(2, 5),), strict=strict))
    assert names == [f"aten.{name}" for name in [*PLAIN, "linear.default"]]


@both_ways
def test_the_batch_may_have_any_size(strict):
    m = model()
    sizes = {"x": {0: torch.export.Dim("batch", max=64)}}
    program = torch.export.export(m, (batch(),), dynamic_shapes=sizes, strict=strict)
    for size in (2, 3, 5):
        x = batch(size)
        torch.testing.assert_close(program.module()(x), m(x))


def test_gradients_of_a_program_for_training():
    m, x = model().train(), batch()
    export = getattr(torch.export, "export_for_training", torch.export.export)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of the former
        trained = export(m, (x,)).module()
    wide = copy.deepcopy(m).double()
    for module, y in ((trained, x), (wide, x.double())):
        module(y).square().sum().backward()
    want = dict(wide.named_parameters())
    got = dict(trained.named_parameters())
    assert got.keys() == want.keys()
    for name, parameter in got.items():
        torch.testing.assert_close(parameter.grad.double(), want[name].grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dim", [0, 1, 2, None])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_values_and_gradients(dim, dtype):
    v, g, grad_w = randn((3, 4, 5), dtype), randn_g((3, 4, 5), dim, dtype), randn((3, 4, 5), dtype)
    v.requires_grad_(), g.requires_grad_()
    w = exported(dim, v, g)
    assert w.dtype == dtype
    reference.assert_close("w", w, reference.forward(v, g, dim))
    expected = reference.backward(v, g, grad_w, dim)
    for name, got, want in zip("vg", torch.autograd.grad(w, (v, g), grad_w), expected, strict=True):
        reference.assert_close(f"grad_{name}", got, want)


def test_a_vector_has_a_norm_for_each_element():
    v, g = randn((6,)), randn_g((6,), 0)
    reference.assert_close("w", exported(0, v, g), reference.forward(v, g, 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_one_norm_over_half_types_is_that_of_g(dtype):
    """As g's dtype holds it: with it as g, w is v."""
    for _ in range(5):
        v = randn((8, 9), dtype)
        assert torch.equal(exported(None, v, F.norm_except_dim(v, None)), v)


def test_mixed_dtypes_and_a_result_of_another():
    v, g = randn((4, 5), torch.bfloat16), randn_g((4, 5), 0)
    w = exported(0, v, g, out_dtype=torch.float32)
    assert w.dtype == torch.float32
    reference.assert_close("w", w, reference.forward(v, g, 0))


@pytest.mark.parametrize("dim", [0, None])
def test_long_rows_are_exact(dim):
    """torch's vector_norm errs by 2e-6 on these, and by 8e-5 where one norm spans them all."""
    v, g = randn((16, 1 << 18)), randn_g((16, 1 << 18), dim)
    w, want = exported(dim, v, g), reference.weight_norm(v, g, dim)
    assert ((w - want).abs().max() / want.abs().max()).item() < 5e-7


def test_eps_keeps_zero_rows_finite():
    v, g = randn((4, 5)), randn_g((4, 5), 0)
    v[1] = 0
    v[2] *= 1e-3
    v.requires_grad_(), g.requires_grad_()
    w, want = exported(0, v, g, eps=0.1), reference.weight_norm(v, g, 0, eps=0.1)
    torch.testing.assert_close(w, want.float())
    got = torch.autograd.grad(w.sum(), (v, g))
    assert all(t.isfinite().all() for t in got)
    torch.testing.assert_close(got, torch.autograd.grad(want.sum(), (v, g)))


def test_channels_last_is_kept():
    v, g = randn((8, 6, 3, 3), layout="channels_last"), randn_g((8, 6, 3, 3), 0)
    assert exported(0, v, g).is_contiguous(memory_format=torch.channels_last)


@both_ways
def test_lists(strict):
    class Lists(nn.Module):
        def forward(self, v: list[Tensor], g: list[Tensor]) -> list[Tensor]:
            return F.weight_norms(v, g, [0, None])

    v = [randn((4, 5)), randn((3, 2, 2))]
    g = [randn_g((4, 5), 0), randn_g((3, 2, 2), None)]
    program = torch.export.export(Lists(), (v, g), strict=strict)
    assert of_ours(operators(program)) == []
    torch.testing.assert_close(program.module()(v, g), F.weight_norms(v, g, [0, None]))


@with_messages
def test_bad_input_is_refused(strict):
    with pytest.raises(Exception, match=message("g", r"shape \[4, 1\]", r"\[1, 1\]")[1:]):
        torch.export.export(Function(), (torch.ones(4, 3), torch.ones(1, 1)), strict=strict)


@with_hooks
def test_a_fused_model(strict, launched):
    m, x = model(), batch()
    wnkernel.fuse(m, reuse="version")
    want = m(x)
    program = torch.export.export(m, (x,), strict=strict)
    assert of_ours(operators(program)) == []
    torch.testing.assert_close(program.module()(x), want)
    assert torch.equal(m(x), want)
    assert launched == [3]


@both_ways
def test_a_converted_layer_with_legacy_names(strict):
    layer = legacy_weight_norm(nn.Conv1d(2, 4, 3))
    wnkernel.convert(layer)
    program = torch.export.export(layer, (batch(),), strict=strict)
    assert of_ours(operators(program)) == []
    keys = {f"parametrizations.weight.original{k}" for k in (0, 1)}
    assert set(program.state_dict) == {"bias", *keys}
    x = batch()
    torch.testing.assert_close(program.module()(x), layer(x))


@of_rnns
@pytest.mark.parametrize(("kind", "name"), [(nn.LSTM, "weight_hh_l0"), (nn.GRU, "weight_ih_l0")])
def test_rnns(kind, name, strict):
    rnn, x = wnkernel.weight_norm(kind(4, 5), name), torch.randn(3, 2, 4)
    want = rnn(x)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's: of RNNs that are written to in their forward
        program = torch.export.export(rnn, (x,), strict=strict)
    assert of_ours(operators(program)) == []
    torch.testing.assert_close(program.module()(x)[0], want)
    assert torch.equal(rnn(x)[0], want)


@both_ways
def test_a_folded_model_has_no_weight_norm_left(strict):
    m, x = folded(model()), batch()
    program = torch.export.export(m, (x,), strict=strict)
    assert not [name for name in operators(program) if "mul" in name or "sum" in name]
    assert torch.equal(program.module()(x), m(x))


@layers_in_graphs
@pytest.mark.usefixtures("fresh_compiler")
def test_compilers_keep_the_operator_after_an_export(ops):
    m, x = model(), batch()
    torch.export.export(m, (x,), strict=True)
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compile(m, backend=keep, fullgraph=True)(x)
    for graph in (*graphs, make_fx(m)(x)):
        assert len(of_ours([str(node.target) for node in graph.graph.nodes])) == 3


@pytest.mark.usefixtures("ops")
def test_other_threads_compute_as_ever():
    """The flag of an export is seen on every thread. What is not traced has our bits."""
    m, x = model(), batch()
    want = m.head.weight.clone()
    exporting, done = threading.Event(), threading.Event()
    seen = []

    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            exporting.set()
            assert done.wait(PATIENCE_S)
            return x

    def read() -> None:
        try:
            assert exporting.wait(PATIENCE_S)
            seen.append((m.head.weight, m.head.weight.grad_fn.name()))
        finally:
            done.set()

    name = m.head.weight.grad_fn.name()
    thread = threading.Thread(target=read)
    thread.start()
    try:
        torch.export.export(Slow(), (x,), strict=False)
    finally:
        thread.join()
    assert torch.equal(seen[0][0], want)
    assert seen[0][1] == name
