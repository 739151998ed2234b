"""norm_except_dim: the norms that weight_norm divides by, and their derivatives of every order."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian
from torch.autograd.graph import saved_tensors_hooks
from torch.func import grad, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from wnkernel import functional as F
from wnkernel import native

from .. import reference
from ..cases import DTYPES, EMPTY_SHAPES, LAYOUTS, SHAPES, g_shape, layout_dims, randn, shape_dims

SHAPE = (3, 4, 5)
HALVES = (torch.float16, torch.bfloat16)
all_dims = pytest.mark.parametrize("dim", [0, 1, 2, -2, None])


def assert_close(norm, v, dim):
    want = reference.norm(v, dim)
    length = max(v.numel() // max(want.numel(), 1), 1)
    acc = torch.float64 if v.dtype == torch.float64 else torch.float32
    reference.assert_close("norm", norm, reference.Expected(want, want, length, acc))


def test_a_sparse_gradient(route):
    """That of an embedding whose rows are norms."""
    v = randn((5, 3)).requires_grad_()
    for sparse in (False, True):
        norms = torch.nn.functional.embedding(
            torch.tensor([1, 3, 1]), F.norm_except_dim(v), sparse=sparse
        )
        (grad,) = torch.autograd.grad(norms.square().sum(), v)
        torch.testing.assert_close(grad, 2 * v.detach() * torch.tensor([0.0, 2, 0, 1, 0])[:, None])


def assert_right(v, dim):
    """Right, and with them as g, w is v: to the last bit, but for norms of halves. If those are
    many, they are rounded, and w divides by what they were."""
    norm = F.norm_except_dim(v, dim)
    assert norm.dtype == v.dtype
    assert_close(norm, v, dim)
    w = F.weight_norm(v, norm, dim)
    if v.dtype in HALVES and norm.numel() != 1:
        torch.testing.assert_close(w, v, rtol=torch.finfo(v.dtype).eps, atol=0)
    else:
        assert torch.equal(w, v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(route, shape, dtype):
    interpreted = route == "triton" and not torch.cuda.is_available()
    if interpreted and dtype in (torch.bfloat16, torch.float64):
        pytest.skip("one half and one full type are enough for the slow interpreter of Triton")
    for dim in (None, *range(len(SHAPES[shape]))):
        if (shape, dim) != ("long_rows", 1):  # which takes the interpreter of Triton seconds
            assert_right(randn(SHAPES[shape], dtype), dim)


@pytest.mark.parametrize(("shape", "dim"), shape_dims(EMPTY_SHAPES))
def test_norms_of_no_elements_are_zero(route, shape, dim):
    v = randn(shape).requires_grad_()
    norm = F.norm_except_dim(v, dim)
    assert norm.shape == g_shape(shape, dim)
    assert norm.eq(0).all()
    norm.sum().backward()
    assert v.grad.shape == shape


@pytest.mark.parametrize(("layout", "dim"), layout_dims())
def test_layouts(route, layout, dim):
    assert_right(randn(LAYOUTS[layout], torch.float32, layout), dim)


@pytest.mark.parametrize("dim", [0, 1, 2, None])
@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_extreme_rows(route, dim, size):
    """The norms are right on every backend, w where the kernels of the backend take such rows."""
    v = randn(SHAPE) * size
    if route == "eager" and dim in (0, 2):
        assert_close(F.norm_except_dim(v, dim), v, dim)
    else:
        assert_right(v, dim)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(1, 40), (4, 10), (300, 2), (1, 3000)], ids=str)
def test_one_norm_of_halves_gives_v(route, shape, dtype):
    """With w divided by the norm as it was before it was rounded to g's dtype, one draw in four is
    off, and PyTorch's own test of weight norm fails as often."""
    for _ in range(8):
        v = randn(shape, dtype)
        assert_right(v, None)
        if shape[0] == 1:
            assert_right(v, 0)


@pytest.mark.parametrize("size", [3e4, 1e-7])
def test_one_norm_that_float16_cannot_hold(route, size):
    """Beyond its range, and below its normal numbers: w divides by the norm as it is."""
    v, g = (randn((20, 20), torch.float64) * size).clamp(-6e4, 6e4).half(), randn((), torch.float16)
    reference.assert_close("w", F.weight_norm(v, g, None), reference.forward(v, g, None))
    norm = reference.norm(v, None).half().double()
    assert norm.isinf() or norm < torch.finfo(torch.float16).smallest_normal


@pytest.mark.parametrize("eps", [0.5, 50.0])
def test_a_bound_on_one_norm_of_halves_is_not_rounded(route, eps):
    v, g = randn((20, 20), torch.bfloat16), torch.ones((), dtype=torch.bfloat16)
    eps *= 1.003  # between two numbers of bfloat16
    w = F.weight_norm(v, g, None, eps=eps, out_dtype=torch.float32)
    reference.assert_close("w", w, reference.forward(v, g, None, eps))


@pytest.mark.parametrize("shape", [(512, 4096), (4, 100_000)], ids=str)
def test_long_rows_of_the_composed_formula(shape):
    """``torch.linalg.vector_norm`` adds one after the other on the CPU: it is off by 1e-4 here."""
    v = randn(shape)
    for dim in (0, 1, None):
        (norm,) = vmap(lambda v, dim=dim: F.norm_except_dim(v, dim))(v[None])
        torch.testing.assert_close(norm.double(), reference.norm(v, dim), rtol=5e-7, atol=0)
        w = vmap(lambda v, norm, dim=dim: F.weight_norm(v, norm, dim))(v[None], norm[None])
        assert torch.equal(w[0], v)


# Derivatives


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1, 2, None])
def test_gradient(route, dim, dtype):
    v, g = randn(SHAPE, dtype).requires_grad_(), randn(g_shape(SHAPE, dim), dtype)
    (got,) = torch.autograd.grad(F.norm_except_dim(v, dim), v, g)
    assert got.dtype == dtype
    with torch.no_grad():
        reference.assert_close("grad_v", got, reference.forward(v, g.double(), dim))


@pytest.mark.parametrize("dim", [0, 1, None])
def test_first_and_second_derivative(backend, dim):
    v = randn((2, 3, 2), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: F.norm_except_dim(v, dim), v)
    if backend != "triton":  # interpreted, and the second derivative is composed
        assert torch.autograd.gradgradcheck(lambda v: F.norm_except_dim(v, dim), v)


def three_times(norms, v):
    """A third derivative, of a function in which nothing vanishes."""
    once = slope_of(norms(v).pow(3).sum(), v)
    twice = slope_of((once * torch.linspace(1, 2, v.numel()).view_as(v)).sum(), v)
    return slope_of(twice.sin().sum(), v)


def slope_of(y, x):
    return torch.autograd.grad(y, x, create_graph=True)[0]


@all_dims
def test_third_derivative(route, dim):
    v = randn(SHAPE, torch.float64).requires_grad_()
    got = three_times(lambda v: F.norm_except_dim(v, dim), v)
    torch.testing.assert_close(got, three_times(lambda v: reference.norm(v, dim), v))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_zero_rows_have_no_gradient(route, dim):
    v = randn(SHAPE)
    v.select(dim, 1).zero_()
    v.requires_grad_()
    norm = F.norm_except_dim(v, dim)
    assert norm.select(dim, 1).item() == 0
    once = slope_of(norm.sum() + norm.square().sum(), v)
    twice = slope_of((once * v.detach().cos()).sum(), v)
    for slope in (once, twice):
        assert slope.select(dim, 1).eq(0).all()
        assert slope.isfinite().all()
        assert slope.ne(0).any()


def test_one_norm_of_zeros_has_a_gradient_of_zeros(route):
    v = torch.zeros(SHAPE, requires_grad=True)
    norm = F.norm_except_dim(v, None)
    norm.backward()
    assert norm == 0
    assert v.grad.eq(0).all()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_bad_row_spoils_no_other(route, bad):
    v = randn(SHAPE)
    v[1, 0, 0] = bad
    v.requires_grad_()
    norm = F.norm_except_dim(v)
    norm.sum().backward()
    assert not norm[1].isfinite()
    assert norm[[0, 2]].isfinite().all()
    assert v.grad[[0, 2]].isfinite().all()


def test_backward_runs_twice_and_saves_nothing(route):
    v = randn(SHAPE).requires_grad_()
    seen = []
    with saved_tensors_hooks(seen.append, lambda _: None):
        norm = F.norm_except_dim(v)
    assert not seen
    norm.sum().backward()
    first = v.grad.clone()
    norm.sum().backward()
    torch.testing.assert_close(v.grad, 2 * first)


def test_v_that_was_changed_is_refused(route):
    v = randn(SHAPE).requires_grad_()
    norm = F.norm_except_dim(v)
    with torch.no_grad():
        v.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: v of shape"):
        norm.sum().backward()


@all_dims
def test_forward_mode(route, dim):
    v, tangent = randn(SHAPE, torch.float64), randn(SHAPE, torch.float64)
    _, want = jvp(lambda v: reference.norm(v, dim), (v,), (tangent,))
    torch.testing.assert_close(jvp(lambda v: F.norm_except_dim(v, dim), (v,), (tangent,))[1], want)
    with forward_ad.dual_level():
        norm = F.norm_except_dim(forward_ad.make_dual(v, tangent), dim)
        torch.testing.assert_close(forward_ad.unpack_dual(norm).tangent, want)


@all_dims
def test_transforms(route, dim):
    vs = randn((2, *SHAPE), torch.float64)

    def ours(v):
        return F.norm_except_dim(v, dim)

    def oracle(v):
        return reference.norm(v, dim)

    torch.testing.assert_close(vmap(ours)(vs), torch.stack([oracle(v) for v in vs]))
    torch.testing.assert_close(jacrev(ours)(vs[0]), jacrev(oracle)(vs[0]))
    torch.testing.assert_close(jacfwd(ours)(vs[0]), jacfwd(oracle)(vs[0]))
    got, want = (vmap(grad(lambda v, f=f: f(v).exp().sum()))(vs) for f in (ours, oracle))
    torch.testing.assert_close(got, want)


@all_dims
def test_batched_gradients(route, dim):
    v = randn(SHAPE, torch.float64)
    got, want = (
        jacobian(f, v, vectorize=True)
        for f in (lambda v: F.norm_except_dim(v, dim), lambda v: reference.norm(v, dim))
    )
    torch.testing.assert_close(got, want)


# Modes and tracers


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(route, mode):
    v = randn(SHAPE).requires_grad_()
    with mode():
        norm = F.norm_except_dim(v)
        torch.testing.assert_close(F.norm_except_dim(v.clone()), norm)
    assert not norm.requires_grad
    assert_close(norm, v.detach(), 0)


def test_norms_of_frozen_v_are_constant(route):
    assert not F.norm_except_dim(randn(SHAPE)).requires_grad


def test_a_norm_is_alone_in_its_memory(route):
    """torch.save writes all of the memory that a tensor is in."""
    norm = F.norm_except_dim(randn(SHAPE))
    assert norm.untyped_storage().nbytes() == norm.nbytes


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("dim", [1, None])
def test_tracers(backend, dim):
    """They see operators of torch."""
    v = randn(SHAPE)
    for trace in (torch.jit.trace, lambda f, v: make_fx(f)(v)):
        traced = trace(lambda v: F.norm_except_dim(v, dim), v)
        other = randn(SHAPE) + 1
        assert_close(traced(other), other, dim)


@all_dims
def test_meta(route, dim):
    norm = F.norm_except_dim(torch.empty(SHAPE, device="meta", dtype=torch.bfloat16), dim)
    assert norm.is_meta
    assert norm.shape == g_shape(SHAPE, dim)
    assert norm.dtype == torch.bfloat16


def test_where_the_backend_asked_for_cannot_run(backend):
    """A layer is built there, and moved afterwards."""
    v = torch.empty(SHAPE, device="meta")
    if backend != "eager":
        with pytest.raises(RuntimeError, match="was asked for and cannot run"):
            F.weight_norm(v, F.norm_except_dim(v))
    assert F.norm_except_dim(v).is_meta


def test_compiled(fresh_compiler):
    def f(v):
        return F.norm_except_dim(v, 1).square()

    v = randn(SHAPE).requires_grad_()
    got = torch.compile(f, fullgraph=True, backend="aot_eager")(v)
    (slope,) = torch.autograd.grad(got.sum(), v)
    torch.testing.assert_close(got, f(v))
    torch.testing.assert_close(slope, 2 * v.detach())


class Tagged(torch.Tensor):
    """A subclass as most are: torch's own code runs, and results are of it."""


def test_subclasses_stay_what_they_are(route):
    norm = F.norm_except_dim(randn(SHAPE).as_subclass(Tagged))
    assert type(norm) is Tagged


@pytest.mark.skipif(not native.loaded(), reason=native.load_error() or "wnkernel._C is loaded")
def test_the_compiled_module_rounds_one_norm_of_halves_as_python_does():
    """The compiled module has the rule on halves in C++ as well, and composes in C++."""
    for dtype in HALVES:
        v = randn((4, 16, 16), dtype)
        norm = torch.stack([F.norm_except_dim(x, None) for x in v])
        w = vmap(lambda v, g: torch.ops.wnkernel.weight_norm(v, g, -1))(v, norm)
        assert torch.equal(w, v)
