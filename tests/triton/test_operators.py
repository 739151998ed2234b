"""``torch.ops.wnkernel`` on the Triton kernels, as on GPUs that the compiled module has none for.

In Triton's interpreter they take the place of those for the CPU, under the same schemas and the
same autograd in C++.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile
from torch.fx import GraphModule
from torch.library import Library, opcheck

import wnkernel
from wnkernel import functional as F
from wnkernel import native
from wnkernel.backends import gpu_operators
from wnkernel.backends.operators import OPERATORS
from wnkernel.streams import GPUS

from .. import reference
from ..cases import DTYPES, LAYOUTS, layout_dims, randn, randn_g
from ..exports import of_ours, operators
from ..messages import message
from ..operators import arguments, halves, lists
from .cases import DEVICE, TRITON, Launch, fresh, needs_triton, record_launches

pytestmark = [
    needs_triton,
    pytest.mark.skipif(not native.loaded(), reason="without wnkernel._C there are no operators"),
    pytest.mark.filterwarnings("ignore:Warning only once for all operators:UserWarning"),
]


@pytest.fixture(autouse=True)
def _on_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The operators on the device of the tests are Triton's until the test is over."""
    fresh(monkeypatch)
    if DEVICE.type in TRITON.operator_devices:
        yield
        return
    monkeypatch.setattr(TRITON, "operator_devices", [DEVICE.type])
    library = Library("wnkernel", "IMPL", {**GPUS, "cpu": "CPU"}[DEVICE.type])
    for name in OPERATORS:
        library.impl(name, getattr(gpu_operators, name))
    with profile():  # one weight on the CPU goes through the dispatcher if somebody waits there
        yield
    library._destroy()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    return record_launches(monkeypatch)


@pytest.fixture
def ops() -> Any:
    return torch.ops.wnkernel


@pytest.fixture
def too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that Triton does not support."""
    monkeypatch.setattr(TRITON, "takes", lambda v: False)


def kernels(launches: list[Launch]) -> list[str]:
    return [launch.kernel for launch in launches]


def test_they_are_the_kernels_of_triton(ops, launches):
    v, g, dim = arguments(1, grad=True)
    w = ops.weight_norm(v, g, dim)
    torch.autograd.grad(w.sum(), (v, g))
    w, norm = ops.forward([v], [g], [dim], [0.0])
    ops.backward([w], [v], [g], [norm], [dim], [0.0], [1], [1])
    assert kernels(launches) == 2 * ["forward_one", "backward_one"]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dim", [0, 1, None])
def test_opcheck_weight_norm(ops, launches, dim, grad):
    opcheck(ops.weight_norm.default, arguments(dim, grad=grad))
    assert launches


@pytest.mark.parametrize("options", [{"eps": 0.5}, {"out_dtype": torch.bfloat16}], ids=str)
def test_opcheck_options(ops, options):
    opcheck(ops.weight_norm.default, arguments(0, grad=True), options)


@pytest.mark.parametrize(("layout", "dim"), [p for p in layout_dims() if p.values[1] in (1, None)])
def test_opcheck_layouts(ops, launches, layout, dim):
    """The fakes promise strides too."""
    tensors = arguments(dim, shape=LAYOUTS[layout], layout=layout)
    opcheck(ops.weight_norm.default, tensors)
    opcheck(ops.backward.default, (*lists(tensors), [True], [True]))
    assert {"forward_one", "backward_one"} == {*kernels(launches)}


@pytest.mark.parametrize(("layout", "dim"), layout_dims(["transposed", "gaps", "expanded"]))
def test_opcheck_layouts_where_triton_cannot_run(ops, launches, too_old, layout, dim):
    """torch's operators choose orders of their own."""
    tensors = arguments(dim, shape=LAYOUTS[layout], layout=layout)
    opcheck(ops.weight_norm.default, tensors)
    (grad_w,), *others = lists(tensors)
    for grad in (grad_w, grad_w.contiguous()):
        opcheck(ops.backward.default, ([grad], *others, [True], [True]))
    assert launches == []


def test_opcheck_transposed_with_gaps_where_triton_cannot_run(ops, too_old):
    v = torch.randn(4, 6, 10)[..., ::2].permute(2, 0, 1)
    problem = v, randn_g(tuple(v.shape), 0), 0
    opcheck(ops.weight_norm.default, problem)
    opcheck(ops.backward.default, (*lists(problem), [True], [True]))


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_lists(ops, launches, grad):
    problems = [arguments(d, grad=grad) for d in (0, 1, None)]
    v, g, dim = (list(column) for column in zip(*problems, strict=True))
    opcheck(ops.forward.default, (v, g, dim, [0.0] * 3, torch.bfloat16))
    opcheck(ops.backward.default, (*lists(*problems), [True, False, True], [True, True, False]))
    assert {"forward_list", "backward_list"} <= {*kernels(launches)}
    assert not TRITON._launcher._tables._kept  # a compiler may count what is left on the device


def test_a_list_is_one_launch_each_way(ops, launches):
    dims = [0, 1, 2, None]
    problems = [arguments(d, shape=(3, 4 + k, 5), grad=True) for k, d in enumerate(dims)]
    v, g, dim = (list(column) for column in zip(*problems, strict=True))
    grad_w = [torch.randn_like(t) for t in v]
    w, norm = halves(ops.forward(v, g, dim, [0.0] * 4))
    torch.autograd.backward(w, grad_w)
    assert kernels(launches) == ["forward_list", "backward_list"]
    for k in range(4):
        reference.assert_close("w", w[k], reference.forward(v[k], g[k], dim[k]))
        want_v, want_g = reference.backward(v[k], g[k], grad_w[k], dim[k])
        reference.assert_close("grad_v", v[k].grad, want_v)
        reference.assert_close("grad_g", g[k].grad, want_g)
        assert norm[k].shape == g[k].shape


def test_nothing_of_a_list_is_contiguous(ops):
    """Not even its norms."""
    v = [randn((6, 5, 8), layout="cut") for _ in range(2)]
    g = [torch.randn(6, 2, 1)[:, :1] for _ in range(2)]
    grad_w = [randn((6, 5, 8), layout="transposed") for _ in range(2)]
    w, norm = halves(ops.forward(v, g, [0] * 2, [0.0] * 2))
    spaced = [torch.stack([n, 2 * n], 1).select(1, 0) for n in norm]
    assert not any(n.is_contiguous() for n in spaced)
    grads = halves(ops.backward(grad_w, v, g, spaced, [0] * 2, [0.0] * 2, [1, 1], [1, 1]))
    for k in range(2):
        reference.assert_close("w", w[k], reference.forward(v[k], g[k], 0))
        want = reference.backward(v[k], g[k], grad_w[k], 0)
        for name, got, expected in zip(("grad_v", "grad_g"), grads, want, strict=True):
            reference.assert_close(name, got[k], expected)


def backward_lists(count: int = 2) -> dict[str, list]:
    """Arguments of backward by their names."""
    columns = lists(*(arguments(0) for _ in range(count)))
    names = "grad_w", "v", "g", "norm", "dim", "eps"
    more = {"need_v": [1] * count, "need_g": [1] * count}
    return dict(zip(names, columns, strict=True)) | more


FORWARD = ("v", "g", "dim", "eps")

# argument -> (its second entry, error, message)
BAD = {
    "norm of another dtype": (
        "norm", torch.ones(3, 1, 1, dtype=torch.float64), TypeError,
        message("norm", "[Ff]loat", "[Dd]ouble|float64"),
    ),
    "norm of another dim": (
        "norm", torch.ones(1, 4, 1), ValueError, message("norm", r"\[3, 1, 1\]", r"\[1, 4, 1\]")
    ),
    "norm too short": (
        "norm", torch.ones(2, 1, 1), ValueError, message("norm", r"\[3, 1, 1\]", r"\[2, 1, 1\]")
    ),
    "integer norm": (
        "norm", torch.ones(3, 1, 1, dtype=torch.int32), TypeError,
        message("norm", "float32", "[Ii]nt"),
    ),
    "norm elsewhere": (
        "norm", torch.ones(3, 1, 1, device="meta"), ValueError,
        message("norm", f"device {DEVICE}", "meta"),
    ),
    "grad_w of another shape": (
        "grad_w", torch.ones(3, 4, 6), ValueError, message("grad_w", "4, 5", "4, 6")
    ),
    "g of another shape": ("g", torch.ones(4, 1, 1), ValueError, message("g", "3, 1", "4, 1")),
    "infinite eps": ("eps", float("inf"), ValueError, message("eps", ">= 0", "inf")),
    "no such dim": ("dim", 3, ValueError, message("dim", "-3 <= dim < 3", "3")),
}  # fmt: skip


@pytest.fixture(params=["triton", "torch"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks come before the choice of kernels."""
    if request.param == "torch":
        request.getfixturevalue("too_old")


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_entries(ops, either, launches, case):
    name, entry, error, text = case
    arguments = backward_lists()
    arguments[name][1] = entry
    with pytest.raises(error, match=text):
        ops.backward(**arguments)
    if name in FORWARD:
        with pytest.raises(error, match=text):
            ops.forward(**{key: arguments[key] for key in FORWARD})
    assert launches == []


@pytest.mark.parametrize("name", ["g", "norm", "grad_w", "dim", "eps", "need_v", "need_g"])
def test_lists_of_different_lengths(ops, either, name):
    arguments = backward_lists()
    arguments[name] = arguments[name][:1]
    with pytest.raises(ValueError, match=message(name, "2 entries", "1")):
        ops.backward(**arguments)
    if name in FORWARD:
        with pytest.raises(ValueError, match=message(name, "2 entries", "1")):
            ops.forward(**{key: arguments[key] for key in FORWARD})


def test_lists_on_two_devices(ops, either):
    arguments = {
        key: [entries[0], entries[1].to("meta") if isinstance(entries[1], Tensor) else entries[1]]
        for key, entries in backward_lists().items()
    }
    with pytest.raises(ValueError, match=f"^v: expected all on {DEVICE}, entry 1 is on meta$"):
        gpu_operators.backward(**arguments)
    forward = {key: arguments[key] for key in FORWARD}
    for call in (ops.forward, gpu_operators.forward):  # the dispatcher may prefer either
        with pytest.raises(ValueError, match=f"^v: expected all on {DEVICE}, entry 1 is on meta$"):
            call(**forward)


class Graphs:
    """A backend of torch.compile that keeps what it was given."""

    def __init__(self) -> None:
        self.seen: list[GraphModule] = []

    def __call__(self, graph: GraphModule, inputs: list[Tensor]) -> Any:
        self.seen.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def operators(self) -> list[str]:
        """Of this package."""
        targets = [str(node.target) for graph in self.seen for node in graph.graph.nodes]
        return [t for t in targets if "wnkernel" in t]


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    torch.compiler.reset()
    yield Graphs()
    torch.compiler.reset()


@pytest.mark.parametrize("count", [1, 3])
def test_compiled_into_one_operator(launches, graphs, count):
    """And its backward."""
    problems = [arguments(dim, grad=True) for dim in (1, None, 0)[:count]]
    vs, gs, dims = (list(column) for column in zip(*problems, strict=True))

    def step(vs: list[Tensor], gs: list[Tensor]) -> list[Tensor]:
        if count == 1:
            return [F.weight_norm(vs[0], gs[0], dims[0]).tanh()]
        return [w.tanh() for w in F.weight_norms(vs, gs, dims)]

    def gradients(ys: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(sum(y.square().sum() for y in ys), [*vs, *gs])

    with wnkernel.use_backend("triton"):
        want = step(vs, gs)
        want_gradients = gradients(want)
        launched = kernels(launches)
        launches.clear()
        got = torch.compile(step, backend=graphs, fullgraph=True)(vs, gs)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(gradients(got), want_gradients)
    assert graphs.operators() == [f"wnkernel.{'weight_norm' if count == 1 else 'forward'}"]
    assert kernels(launches) == launched


def test_a_compiled_layer(launches, graphs):
    layer = wnkernel.weight_norm(nn.Linear(5, 3))
    x = torch.randn(2, 5)
    with wnkernel.use_backend("triton"):
        want = layer(x)
        launches.clear()
        torch.testing.assert_close(torch.compile(layer, backend=graphs, fullgraph=True)(x), want)
    assert len(graphs.operators()) == 1
    assert kernels(launches) == ["forward_one"]


def test_exported(launches):
    layer = wnkernel.weight_norm(nn.Linear(5, 3))
    x = torch.randn(2, 5)
    with wnkernel.use_backend("triton"):
        want = layer(x)
        launches.clear()
        program = torch.export.export(layer, (x,))
        torch.testing.assert_close(program.module()(x), want)
    assert of_ours(operators(program)) == []
    assert kernels(launches) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_of_the_backend(ops, dtype):
    """Whichever way the kernels are reached."""
    v, g, dim = arguments(0, dtype)
    with wnkernel.use_backend("triton"):
        assert torch.equal(ops.weight_norm(v, g, dim), F.weight_norm(v, g, dim))
