"""torch.func and forward-mode AD against the float64 oracle under the same transform."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap

import wnkernel
from wnkernel import functional as F

from .. import reference
from ..cases import g_shape, randn, randn_g

SHAPE = (3, 4, 5)
all_dims = pytest.mark.parametrize("dim", [0, 1, 2, -2, None])


def pair(dim, *batch):
    """v and g, and a tangent for each, in float64."""
    shapes = (*batch, *SHAPE), (*batch, *g_shape(SHAPE, dim))
    return [randn(shape, torch.float64) for shape in (*shapes, *shapes)]


def ours(dim, **options):
    return lambda v, g: F.weight_norm(v, g, dim, **options)


def oracle(dim, eps=0.0):
    return lambda v, g: reference.weight_norm(v, g, dim, eps)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@all_dims
def test_grad(route, dim):
    v, g, weight, _ = pair(dim)

    def loss(f):
        return lambda v, g: (f(v, g) * weight).sum()

    close(grad(loss(ours(dim)), (0, 1))(v, g), grad(loss(oracle(dim)), (0, 1))(v, g))


@all_dims
def test_grad_of_grad(route, dim):
    v, g, weight, along = pair(dim)

    def slope(f):
        return lambda v, g: (grad(lambda g: (f(v, g) * weight).sum())(g) * along).sum()

    close(grad(slope(ours(dim)), (0, 1))(v, g), grad(slope(oracle(dim)), (0, 1))(v, g))


@all_dims
def test_vjp(route, dim):
    v, g, cotangent, _ = pair(dim)
    w, pull = vjp(ours(dim), v, g)
    want, pull_oracle = vjp(oracle(dim), v, g)
    close(w, want)
    close(pull(cotangent), pull_oracle(cotangent))


@pytest.mark.parametrize("eps", [0.0, 4.0])  # 4: clamps some rows
@all_dims
def test_jvp(route, dim, eps):
    v, g, dv, dg = pair(dim)
    close(jvp(ours(dim, eps=eps), (v, g), (dv, dg)), jvp(oracle(dim, eps), (v, g), (dv, dg)))


@all_dims
@pytest.mark.parametrize("whose", ["v", "g", "both"])
def test_dual_tensors(route, whose, dim):
    v, g, dv, dg = pair(dim)

    def tangent(f):
        with forward_ad.dual_level():
            dual_v = forward_ad.make_dual(v, dv) if whose != "g" else v
            dual_g = forward_ad.make_dual(g, dg) if whose != "v" else g
            return tuple(forward_ad.unpack_dual(f(dual_v, dual_g)))

    close(tangent(ours(dim)), tangent(oracle(dim)))


@all_dims
@pytest.mark.parametrize("jacobian", [jacrev, jacfwd])
def test_jacobian(route, jacobian, dim):
    v, g, *_ = pair(dim)
    close(jacobian(ours(dim), (0, 1))(v, g), jacobian(oracle(dim), (0, 1))(v, g))


@all_dims
def test_hessian_vector_product(route, dim):
    v, g, dv, dg = pair(dim)

    def slope(f):
        return grad(lambda v, g: f(v, g).pow(3).sum(), (0, 1))

    close(
        jvp(slope(ours(dim)), (v, g), (dv, dg)),
        jvp(slope(oracle(dim)), (v, g), (dv, dg)),
    )


def test_rows_of_one_element(route):
    """A vector, whose norms are magnitudes."""
    v, dv, g, dg = (randn((5,), torch.float64) for _ in range(4))

    def slope(f):
        return grad(lambda v, g: f(v, g).pow(3).sum(), (0, 1))

    got, want = slope(ours(0)), slope(oracle(0))
    close(got(v, g), want(v, g))
    close(jvp(got, (v, g), (dv, dg)), jvp(want, (v, g), (dv, dg)))


@all_dims
@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0)])
def test_vmap(route, in_dims, dim):
    many_v, many_g, *_ = pair(dim, 6)
    v = many_v if in_dims[0] == 0 else many_v[0]
    g = many_g if in_dims[1] == 0 else many_g[0]
    got = vmap(ours(dim), in_dims)(v, g)
    for k in range(6):
        one_v = v[k] if in_dims[0] == 0 else v
        one_g = g[k] if in_dims[1] == 0 else g
        close(got[k], reference.weight_norm(one_v, one_g, dim))


def test_vmap_over_the_last_axis(route):
    v, g = randn((4, 5, 6), torch.float64), randn((4, 1, 6), torch.float64)
    got = vmap(ours(0), in_dims=2, out_dims=1)(v, g)
    for k in range(6):
        close(got[:, k], reference.weight_norm(v[..., k], g[..., k], 0))


def test_vmap_keeps_out_dtype(route):
    v, g = randn((6, 4, 5)), randn((6, 4, 1))
    assert vmap(ours(0, out_dtype=torch.bfloat16))(v, g).dtype == torch.bfloat16


@all_dims
def test_vmap_of_backward(route, dim):
    """Batched cotangents over one graph, as ``is_grads_batched`` and jacobian(vectorize) do."""
    v, g, *_ = (t.requires_grad_() for t in pair(dim))
    cotangents = randn((6, *SHAPE), torch.float64)

    def pull(f):
        return torch.autograd.grad(f(v, g), (v, g), cotangents, is_grads_batched=True)

    close(pull(ours(dim)), pull(oracle(dim)))


def test_vmap_of_backward_of_a_list(route):
    """One weight with both gradients, one whose g is frozen, and one whose v is."""
    pairs = [pair(dim)[:2] for dim in (0, 1, None)]
    inputs = [pairs[0][0], pairs[0][1], pairs[1][0], pairs[2][1]]
    for t in inputs:
        t.requires_grad_()
    cotangents = [randn((6, *SHAPE), torch.float64) for _ in pairs]

    def pull(weights):
        return torch.autograd.grad(weights, inputs, cotangents, is_grads_batched=True)

    v, g = zip(*pairs, strict=True)
    weights = [
        reference.weight_norm(*one, dim) for one, dim in zip(pairs, (0, 1, None), strict=True)
    ]
    close(pull(F.weight_norms(v, g, [0, 1, None])), pull(weights))


@all_dims
def test_per_sample_gradients(route, dim):
    """grad, vmap and functional_call at once, in float32, against a loop over the samples."""
    layer = wnkernel.weight_norm(nn.Conv1d(3, 4, 2), dim=dim)
    parameters = dict(layer.named_parameters())
    x = torch.randn(6, 3, 8)

    def loss(parameters, x):
        return functional_call(layer, parameters, x[None]).square().sum()

    got = vmap(grad(loss), (None, 0))(parameters, x)
    for k in range(6):
        layer.zero_grad()
        loss(parameters, x[k]).backward()
        for name, p in layer.named_parameters():
            torch.testing.assert_close(got[name][k], p.grad, rtol=1e-4, atol=1e-5)


def test_model_ensemble(route):
    """vmap over v and g through the layer."""
    layers = [wnkernel.weight_norm(nn.Linear(5, 4)) for _ in range(3)]
    states = [dict(layer.named_parameters()) for layer in layers]
    stacked = {key: torch.stack([state[key] for state in states]) for key in states[0]}
    x = torch.randn(2, 5)
    got = vmap(lambda parameters: functional_call(layers[0], parameters, x))(stacked)
    for k, layer in enumerate(layers):
        torch.testing.assert_close(got[k], layer(x))


def test_plain_after_a_transform(route):
    """Nothing of a transform is left behind: the fast way has the same bits before and after."""
    v, g = randn(SHAPE), randn_g(SHAPE, 0)
    before = F.weight_norm(v, g)
    jvp(ours(0), (v, g), (v, g))
    vmap(ours(0), (0, None))(v[None], g)
    assert torch.equal(F.weight_norm(v, g), before)
