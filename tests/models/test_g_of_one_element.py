"""g of shape (1,) where one norm spans the whole tensor: the same bits as with a 0-dimensional one,
and its shape everywhere. fully_shard refuses 0-dimensional parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, jacfwd, jacrev, jvp, vmap

import wnkernel
from wnkernel import functional as F

from .. import reference
from ..cases import DTYPES, LAYOUTS, SHAPES, randn
from ..checkpoints import LAYOUTS as KEY_LAYOUTS
from ..checkpoints import all_layouts, g_and_v, loaded, saved
from ..layers import APPLY, legacy_weight_norm, originals
from ..messages import message
from ..operators import lists

SHAPE = (3, 4, 5)


def pair(shape=SHAPE, dtype=torch.float32, layout="contiguous", *, grad=True):
    """v and g, which is 0-dimensional."""
    return randn(shape, dtype, layout).requires_grad_(grad), randn((), dtype).requires_grad_(grad)


def one(g):
    """The same of shape (1,)."""
    return g.detach().reshape(1).requires_grad_(g.requires_grad)


def reshape_g(layer, name="weight"):
    """The recipe of the documentation."""
    p = layer.parametrizations[name]
    p.original0 = nn.Parameter(p.original0.reshape(1))
    return layer


def same_bits(got, want):
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.reshape(b.shape), b)


@pytest.mark.parametrize("eps", [0.0, 1e9])
@pytest.mark.parametrize("shape", [SHAPES[k] for k in ("odd", "vector", "single", "long_rows")])
def test_values_and_gradients(route, shape, eps):
    v, g = pair(shape)
    g1, grad_w = one(g), torch.randn(shape)
    w1, w = F.weight_norm(v, g1, None, eps=eps), F.weight_norm(v, g, None, eps=eps)
    got = torch.autograd.grad(w1, (v, g1), grad_w)
    assert got[1].shape == (1,)
    same_bits((w1, *got), (w, *torch.autograd.grad(w, (v, g), grad_w)))
    reference.assert_close("w", w1, reference.forward(v, g, None, eps))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_orders(route, layout):
    v, g = pair(LAYOUTS[layout], layout=layout, grad=False)
    same_bits([F.weight_norm(v, one(g), -1)], [F.weight_norm(v, g, -1)])


@pytest.mark.parametrize("g_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(route, dtype, g_dtype):
    v, g = pair(dtype=dtype)
    g1 = one(g.to(g_dtype).detach().requires_grad_())
    w = F.weight_norm(v, g1, None, out_dtype=torch.float64)
    assert w.dtype == torch.float64
    w.sum().backward()
    assert (g1.grad.shape, g1.grad.dtype) == ((1,), g_dtype)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
def test_no_elements(route, shape):
    v, g = pair(shape)
    g = one(g)
    F.weight_norm(v, g, None).sum().backward()
    assert torch.equal(g.grad, torch.zeros(1))


@pytest.mark.parametrize("eps", [0.0, 1e9])
def test_second_derivative(route, eps):
    v, g = pair((2, 2), torch.float64)
    f = lambda v, g: F.weight_norm(v, g, None, eps=eps)  # noqa: E731
    assert torch.autograd.gradcheck(f, (v, one(g)))
    assert torch.autograd.gradgradcheck(f, (v, one(g)))


def test_lists(route):
    """Both shapes in one, and other dims beside them."""
    weights = [pair((4, k + 2)) for k in range(3)]
    v = [v for v, _ in weights]
    g = [weights[0][1], one(weights[1][1]), torch.randn(4, 1, requires_grad=True)]
    ws = F.weight_norms(v, g, [None, -1, 0])
    singles = [F.weight_norm(*each) for each in zip(v, g, [None, -1, 0], strict=True)]
    same_bits(ws, singles)
    grads = torch.autograd.grad(sum(w.sum() for w in ws), g)
    assert [t.shape for t in grads] == [t.shape for t in g]


@pytest.mark.parametrize("transform", [jacrev, jacfwd])
def test_jacobians(route, transform):
    v, g = (t.detach() for t in pair(dtype=torch.float64))
    got = transform(lambda v, g: F.weight_norm(v, g, None), (0, 1))(v, one(g))
    want = transform(lambda v, g: reference.weight_norm(v, g, None), (0, 1))(v, g)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.reshape(b.shape), b)
    assert got[1].shape == (*SHAPE, 1)


def test_other_transforms(route):
    v, g = (t.detach() for t in pair((6, *SHAPE), torch.float64))
    many = torch.rand(6, 1, dtype=torch.float64)
    got = vmap(lambda v, g: F.weight_norm(v, g, None))(v, many)
    want = vmap(lambda v, g: reference.weight_norm(v, g, None))(v, many.squeeze(1))
    torch.testing.assert_close(got, want)
    slope = grad(lambda g: F.weight_norm(v[0], g, None).sum())(one(g))
    torch.testing.assert_close(slope, reference.weight_norm(v[0], g, None).sum()[None] / g)
    _, tangent = jvp(lambda g: F.weight_norm(v[0], g, None), (one(g),), (one(g),))
    torch.testing.assert_close(tangent, reference.weight_norm(v[0], g, None))


def test_batched_gradients(route):
    v, g = pair(dtype=torch.float64)
    g = one(g)
    many = torch.randn(6, *SHAPE, dtype=torch.float64)
    w = F.weight_norm(v, g, None)
    _, got = torch.autograd.grad(w, (v, g), many, is_grads_batched=True, retain_graph=True)
    singles = [torch.autograd.grad(w, g, t, retain_graph=True)[0] for t in many]
    torch.testing.assert_close(got, torch.stack(singles))


@pytest.mark.parametrize("grad", [False, True])
def test_operators(compiled_backend, ops, grad):
    v, g = pair(grad=grad)
    problem = v, one(g), -1
    torch.library.opcheck(ops.weight_norm.default, problem)
    torch.library.opcheck(ops.forward.default, tuple([x] for x in (*problem, 0.0)))
    columns = list(lists(problem))
    columns[3] = [columns[3][0].reshape(1)]
    torch.library.opcheck(ops.backward.default, (*columns, [True], [True]))
    assert ops.forward([v], [problem[1]], [-1], [0.0])[1].shape == (1,)


def test_fake_tensors(route):
    with FakeTensorMode():
        v, g = torch.empty(SHAPE, requires_grad=True), torch.empty(1, requires_grad=True)
        w = F.weight_norm(v, g, None)
        w.sum().backward()
    assert (w.shape, g.grad.shape) == (SHAPE, (1,))


def test_meta_device():
    v, g = (torch.empty(s, device="meta", requires_grad=True) for s in (SHAPE, (1,)))
    F.weight_norm(v, g, None).sum().backward()
    assert (v.grad.shape, g.grad.shape) == (SHAPE, (1,))


@pytest.mark.parametrize("shape", [(2,), (0,), (1, 1), (1, 1, 1)])
def test_other_shapes_are_refused(route, shape):
    v, _ = pair()
    with pytest.raises(ValueError, match=message("g", r"shape \[\] or \[1\]", r"\[")):
        F.weight_norm(v, torch.ones(shape), None)


def test_other_dims_do_not_take_it(route):
    with pytest.raises(ValueError, match=message("g", r"shape \[3, 1, 1\]", r"\[1\]")):
        F.weight_norm(pair()[0], torch.ones(1), 0)


@pytest.mark.parametrize("shape", [(), (2,), (1, 1)])
def test_norms_have_the_shape_of_g(compiled_backend, ops, shape):
    v, g = pair(grad=False)
    lists = [v], [v], [one(g)], [torch.ones(shape)], [-1], [0.0], [1], [1]
    with pytest.raises(ValueError, match=message("norm", r"shape \[1\]", r"\[")):
        ops.backward(*lists)


def model():
    norm = wnkernel.weight_norm
    return nn.Sequential(
        norm(nn.Conv1d(2, 4, 3), dim=None), nn.Tanh(), nn.Flatten(), norm(nn.Linear(24, 3), dim=-1)
    )


def reshaped(model):
    return nn.Sequential(*(reshape_g(m) if hasattr(m, "parametrizations") else m for m in model))


def trained(model, run=None):
    """Outputs and parameters of some steps."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    record = []
    for k in range(3):
        optimizer.zero_grad()
        x = torch.linspace(-1, 1 + k, 32).view(2, 2, 8)
        record.append((run or model)(x))
        record[-1].square().mean().backward()
        optimizer.step()
    return [*record, *model.parameters()]


@pytest.mark.parametrize("fused", [False, True])
def test_models_train_alike(route, fused):
    one_element = model()
    twin = copy.deepcopy(one_element)
    one_element = reshaped(one_element)
    if fused:
        wnkernel.fuse(one_element)
    same_bits(trained(one_element), trained(twin))
    assert [p.shape for p in one_element.parameters() if p.numel() == 1] == [(1,), (1,)]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("fused", [False, True])
def test_compiled(fused):
    one_element = reshaped(model())
    twin = copy.deepcopy(one_element)
    if fused:
        wnkernel.fuse(one_element)
    compiled = torch.compile(one_element, backend="aot_eager", fullgraph=True)
    for a, b in zip(trained(one_element, compiled), trained(twin), strict=True):
        torch.testing.assert_close(a, b)


def target(kind, g_shape):
    """A layer that one of the three weight norms is on."""
    layer = APPLY[kind](nn.Linear(5, 4), dim=None)
    g = nn.Parameter(torch.ones(g_shape))
    if kind == "legacy":
        layer.weight_g = g
    else:
        layer.parametrizations.weight.original0 = g
    return layer


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", APPLY)
@pytest.mark.parametrize(
    ("layout", "of_checkpoint", "of_layer"),
    [
        (layout, of_checkpoint, of_layer)
        for layout in KEY_LAYOUTS
        for of_checkpoint, of_layer in (((), (1,)), ((1,), ()), ((1,), (1,)))
        if layout != "folded" or of_checkpoint != of_layer  # a plain weight has no g
    ],
)
def test_checkpoints_load_into_either(layout, of_checkpoint, of_layer, kind, assign):
    checkpoint = saved(nn.Linear(5, 4), layout, dim=None)
    if layout != "folded":
        g, _ = g_and_v(kind="torch" if layout == "parametrized" else layout)
        checkpoint[g] = checkpoint[g].reshape(of_checkpoint)
    layer, twin = target(kind, of_layer), target(kind, ())
    for each in (layer, twin):
        with wnkernel.accept_any_layout(each):
            each.load_state_dict(checkpoint, assign=assign and each is layer)
    assert loaded(layer)[0].shape == of_layer
    same_bits(loaded(layer), loaded(twin))
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in layer.parameters())
    x = torch.randn(2, 5)
    torch.testing.assert_close(layer(x), twin(x))


def test_a_list_of_parametrizations_loads_alone():
    layer, twin = reshape_g(target("ours", ())), target("ours", ())
    with torch.no_grad():
        twin.parametrizations.weight.original0.fill_(3.0)
    weights, state = layer.parametrizations.weight, twin.parametrizations.weight.state_dict()
    weights.load_state_dict(state)
    assert torch.equal(weights.original0, torch.full((1,), 3.0))


@pytest.mark.parametrize("as_parameter", [False, True])
@pytest.mark.parametrize("g_shape", [(), (1,)])
def test_assigned_weights(g_shape, as_parameter):
    layer, w = target("ours", g_shape), torch.randn(4, 5)
    g, _ = originals(layer)
    layer.weight = nn.Parameter(w) if as_parameter else w
    assert g is originals(layer)[0]
    assert g.shape == g_shape
    torch.testing.assert_close(layer.weight, w)
    layer.weight.sum().backward()
    assert g.grad.shape == g_shape


def test_a_g_of_one_element_that_is_none_of_these():
    """(1, 1) has always been refused."""
    layer = reshape_g(target("ours", ()))
    state = layer.state_dict()
    state["parametrizations.weight.original0"] = torch.ones(1, 1)
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("like", ["module", "dict"])
@pytest.mark.parametrize("to", ["parametrized", "legacy"])
@pytest.mark.parametrize("g_shape", [(), (1,)])
@all_layouts
def test_state_dicts_convert_to_the_shape_in_like(layout, g_shape, to, like):
    model = target("ours", g_shape)
    checkpoint = saved(nn.Linear(5, 4), layout, dim=None)
    for_like = model if like == "module" else model.state_dict()
    converted = wnkernel.convert_state_dict(checkpoint, to, like=for_like)
    g, _ = g_and_v(kind="torch" if to == "parametrized" else to)
    assert converted[g].shape == g_shape
    if to == "parametrized":  # where no hook of ours runs, too
        strict = nn.utils.parametrizations.weight_norm(nn.Linear(5, 4), dim=None)
        strict.parametrizations.weight.original0 = nn.Parameter(torch.ones(g_shape))
        strict.load_state_dict(converted)


@pytest.mark.parametrize("to", KEY_LAYOUTS)
def test_state_dicts_convert_without_like(to):
    layer = target("ours", (1,))
    state = layer.state_dict()
    converted = wnkernel.convert_state_dict(state, to)
    assert any(t.shape == (1,) for t in converted.values()) == (to != "folded")
    target("ours", (1,)).load_state_dict(converted)
    if to == "folded":
        assert torch.equal(converted["weight"], layer.weight)


@pytest.mark.parametrize("kind", ["torch", "legacy"])
def test_models_convert_and_fold(kind):
    layer = target(kind, (1,))
    w = layer(torch.eye(5)).detach()
    assert wnkernel.convert(layer) == ["weight"]
    assert originals(layer)[0].shape == (1,)
    torch.testing.assert_close(layer(torch.eye(5)), w)
    w = layer.weight.detach()
    assert wnkernel.fold(layer) == ["weight"]
    assert torch.equal(layer.weight, w)


def test_legacy_layers_that_torch_saved_long_ago():
    """torch 0.3 had no 0-dimensional tensors."""
    layer = legacy_weight_norm(nn.Linear(5, 4), dim=None)
    layer.weight_g = nn.Parameter(layer.weight_g.detach().reshape(1))
    want = wnkernel.convert_state_dict(layer.state_dict(), "folded")["weight"]
    wnkernel.fold(layer)
    torch.testing.assert_close(layer.weight, want)
