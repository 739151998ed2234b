"""Bad input to the functions and the operators: a Python error in the form of messages.py."""

from __future__ import annotations

import pytest
import torch

import wnkernel
from wnkernel import functional as F
from wnkernel.backends import BACKENDS

from ..messages import FLOATS, here, message, quantised


def v(**options) -> torch.Tensor:
    return torch.ones(4, 3, **options)


def g(*shape, **options) -> torch.Tensor:
    return torch.ones(shape or (4, 1), **options)


# id -> (arguments, error, argument named, expected, got)
CASES = {
    "g too few": (lambda: (v(), g(1, 1)), ValueError, "g", r"shape \[4, 1\]", r"\[1, 1\]"),
    "g too many": (lambda: (v(), g(5, 1)), ValueError, "g", r"shape \[4, 1\]", r"\[5, 1\]"),
    "g flat": (lambda: (v(), g(4)), ValueError, "g", r"shape \[4, 1\]", r"\[4\]"),
    "g 0-d": (lambda: (v(), torch.ones(())), ValueError, "g", r"shape \[4, 1\]", r"\[\]"),
    "g empty": (lambda: (v(), g(0, 1)), ValueError, "g", r"shape \[4, 1\]", r"\[0, 1\]"),
    "g of another dim": (lambda: (v(), g(4, 1), 1), ValueError, "g", r"\[1, 3\]", r"\[4, 1\]"),
    "g not 0-d": (lambda: (v(), g(1, 1), -1), ValueError, "g", r"shape \[\]", r"\[1, 1\]"),
    "g integer": (lambda: (v(), g(dtype=torch.int64)), TypeError, "g", FLOATS, "[Ii]nt64|[Ll]ong"),
    "g bool": (lambda: (v(), g(dtype=torch.bool)), TypeError, "g", FLOATS, "[Bb]ool"),
    "g complex": (lambda: (v(), g(dtype=torch.complex64)), TypeError, "g", FLOATS, "[Cc]omplex"),
    "v integer": (lambda: (v(dtype=torch.int32), g()), TypeError, "v", FLOATS, "[Ii]nt"),
    "v complex": (lambda: (v(dtype=torch.complex128), g()), TypeError, "v", FLOATS, "[Cc]omplex"),
    "v float8": (lambda: (v().to(torch.float8_e4m3fn), g()), TypeError, "v", FLOATS, "[Ff]loat8"),
    "dim too large": (lambda: (v(), g(), 2), ValueError, "dim", "-2 <= dim < 2", "2"),
    "dim too small": (lambda: (v(), g(), -3), ValueError, "dim", "-2 <= dim < 2", "-3"),
    "dim huge": (lambda: (v(), g(), 2**40), ValueError, "dim", "-2 <= dim < 2", "1099511627776"),
    "v 0-d": (
        lambda: (torch.ones(()), torch.ones(())),
        ValueError,
        "v",
        "at least 1 dim",
        "0-dim",
    ),
    "v 0-d, None": (
        lambda: (torch.ones(()), torch.ones(()), -1),
        ValueError,
        "v",
        "at least 1 dim",
        "0-dim",
    ),
    "device of g": (lambda: (v(), g(device="meta")), ValueError, "g", f"device {here()}", "meta"),
    "eps negative": (lambda: (v(), g(), 0, -1.0), ValueError, "eps", ">= 0", "-1"),
    "eps infinite": (lambda: (v(), g(), 0, float("inf")), ValueError, "eps", ">= 0", "inf"),
    "eps NaN": (lambda: (v(), g(), 0, float("nan")), ValueError, "eps", ">= 0", "nan"),
    "out_dtype": (
        lambda: (v(), g(), 0, 0.0, torch.int32),
        TypeError,
        "out_dtype",
        FLOATS,
        "[Ii]nt",
    ),
}

# Tensors that the dispatcher may refuse on its own before an operator is reached.
LAYOUT_CASES = {
    "v sparse": (lambda: (v().to_sparse(), g()), "v", "[Ss]parse"),
    "g sparse": (lambda: (v(), g().to_sparse()), "g", "[Ss]parse"),
    "v sparse CSR": (lambda: (v().to_sparse_csr(), g()), "v", "[Ss]parse"),
    "v quantised": (lambda: (quantised(v()), g()), "v", "quantized"),
    "g quantised": (lambda: (v(), quantised(g())), "g", "quantized"),
}

# What only Python can be given; a typed operator schema has its own words for these.
PYTHON_CASES = {
    "v list": (lambda: ([[1.0]], g(1, 1)), "v", "torch.Tensor", "list"),
    "g number": (lambda: (v(), 1.0), "g", "torch.Tensor", "float"),
    "g None": (lambda: (v(), None), "g", "torch.Tensor", "NoneType"),
    "dim float": (lambda: (v(), g(), 0.0), "dim", "int or None", "float"),
    "dim bool": (lambda: (v(), g(), True), "dim", "int or None", "bool"),
    "dim string": (lambda: (v(), g(), "0"), "dim", "int or None", "str"),
    "eps string": (lambda: (v(), g(), 0, "0"), "eps", "number", "str"),
    "eps None": (lambda: (v(), g(), 0, None), "eps", "number", "NoneType"),
    "out_dtype string": (lambda: (v(), g(), 0, 0.0, "float32"), "out_dtype", "", "str|float32"),
}


def functional(v, g, dim=0, eps=0.0, out_dtype=None):
    return F.weight_norm(v, g, dim, eps=eps, out_dtype=out_dtype)


@pytest.mark.parametrize("case", CASES)
def test_functional(route, case):
    arguments, error, *pattern = CASES[case]
    with pytest.raises(error, match=message(*pattern)):
        functional(*arguments())


@pytest.mark.parametrize("case", CASES)
def test_functional_with_gradients(route, case):
    arguments, error, *pattern = CASES[case]
    v, g, *rest = arguments()
    for t in (v, g):
        if t.is_floating_point():
            t.requires_grad_()
    with pytest.raises(error, match=message(*pattern)):
        functional(v, g, *rest)


@pytest.mark.parametrize("case", LAYOUT_CASES)
def test_functional_layouts(route, case):
    arguments, name, got = LAYOUT_CASES[case]
    with pytest.raises(TypeError, match=message(name, "a dense strided tensor", got)):
        functional(*arguments())


@pytest.mark.parametrize("case", PYTHON_CASES)
def test_functional_python_types(route, case):
    arguments, *pattern = PYTHON_CASES[case]
    with pytest.raises(TypeError, match=message(*pattern)):
        functional(*arguments())


OF_OPERATORS = [case for case in CASES if case != "eps negative"]
"""Forced weight norms (tests/forced) call operators with an eps that is added to norms."""


@pytest.mark.parametrize("case", OF_OPERATORS)
def test_operator(compiled_backend, ops, case):
    arguments, error, *pattern = CASES[case]
    with pytest.raises(error, match=message(*pattern)):
        ops.weight_norm(*single(*arguments()))


@pytest.mark.parametrize("case", OF_OPERATORS)
def test_operator_forward(compiled_backend, ops, case):
    arguments, error, *pattern = CASES[case]
    with pytest.raises(error, match=message(*pattern)):
        ops.forward(*forward_lists(*arguments()))


@pytest.mark.parametrize("case", LAYOUT_CASES)
def test_operator_layouts(compiled_backend, ops, case):
    arguments, name, got = LAYOUT_CASES[case]
    ours = message(name, "a dense strided tensor", got)
    with pytest.raises((TypeError, NotImplementedError), match=f"{ours}|^Could not run 'wnkernel"):
        ops.weight_norm(*single(*arguments()))
    with pytest.raises((TypeError, NotImplementedError), match=f"{ours}|^Could not run 'wnkernel"):
        ops.forward(*forward_lists(*arguments()))


def single(v, g, dim=0, eps=0.0, out_dtype=None):
    return v, g, dim, eps, out_dtype


def forward_lists(v, g, dim=0, eps=0.0, out_dtype=None):
    return [v], [g], [dim], [eps], out_dtype


@pytest.mark.parametrize("short", range(1, 4))
def test_operator_forward_lists_of_other_lengths(compiled_backend, ops, short):
    lists = list(forward_lists(v(), g()))
    lists[short] = []
    name = ["v", "g", "dim", "eps"][short]
    with pytest.raises((ValueError, RuntimeError), match=message(name, "1", "0")):
        ops.forward(*lists)


def backward_lists(**other):
    lists = dict(
        grad_w=[v()],
        v=[v()],
        g=[g()],
        norm=[g()],
        dim=[0],
        eps=[0.0],
        need_v=[True],
        need_g=[True],
    )
    return list((lists | other).values())


def test_operator_backward_control(compiled_backend, ops):
    ops.backward(*backward_lists())


@pytest.mark.parametrize(
    ("other", "argument"),
    [
        ({"grad_w": [torch.ones(3, 4)]}, "grad_w"),
        ({"grad_w": [torch.ones(4, 3, dtype=torch.int64)]}, "grad_w"),
        ({"grad_w": [torch.ones(4, 3, device="meta")]}, "grad_w"),
        ({"g": [torch.ones(1, 1)]}, "g"),
        ({"norm": [torch.ones(1, 1)]}, "norm"),
        ({"norm": [torch.ones(4, 1, dtype=torch.float64)]}, "norm"),
        ({"norm": [torch.ones(4, 1, dtype=torch.int64)]}, "norm"),
        ({"dim": [2]}, "dim"),
        ({"eps": [float("inf")]}, "eps"),
        ({"grad_w": []}, "grad_w"),
        ({"g": []}, "g"),
        ({"norm": []}, "norm"),
        ({"dim": []}, "dim"),
        ({"eps": []}, "eps"),
        ({"need_v": []}, "need_v"),
        ({"need_g": []}, "need_g"),
    ],
)
def test_operator_backward(compiled_backend, ops, other, argument):
    with pytest.raises(
        (TypeError, ValueError, RuntimeError), match=rf"^{argument}: expected .*got"
    ):
        ops.backward(*backward_lists(**other))


@pytest.mark.parametrize("name", ["nonsense", "CPU"])
def test_unknown_backend(name):
    with pytest.raises(ValueError, match=message("backend", ", ".join(BACKENDS), f"'{name}'")):
        wnkernel.use_backend(name).__enter__()


@pytest.mark.parametrize(
    ("v", "dim", "error", "pattern"),
    [
        (torch.ones(()), None, ValueError, ("v", "at least 1 dim", "0-dim")),
        (torch.ones(3, 4), 2, ValueError, ("dim", "-2 <= dim < 2", "2")),
        (torch.ones(3, 4), 0.5, TypeError, ("dim", "int or None", "float")),
        (torch.ones(3, 4, dtype=torch.int8), 0, TypeError, ("v", FLOATS, "int8")),
        (torch.ones(3, 4).to_sparse(), 0, TypeError, ("v", "dense", "sparse")),
        ([1.0], 0, TypeError, ("v", "torch.Tensor", "list")),
    ],
)
def test_norm_except_dim(v, dim, error, pattern):
    with pytest.raises(error, match=message(*pattern)):
        F.norm_except_dim(v, dim)


@pytest.mark.parametrize(
    ("name", "got"), [("v", "Tensor"), ("g", "Tensor"), ("dim", "int"), ("eps", "float")]
)
def test_lists_that_are_none(name, got):
    """A tensor would be taken for the list of its rows."""
    arguments = {"v": [v()], "g": [g()], "dim": [0], "eps": [0.0]}
    arguments[name] = arguments[name][0]
    with pytest.raises(TypeError, match=message(name, "an entry for each weight", got)):
        F.weight_norms(**arguments)
