"""Bad input to normalize_ and norms_of: an error that says what is wrong, and nothing written."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import wnkernel
from wnkernel import normalize_, norms_of
from wnkernel.backends import BACKENDS

from ..cases import LAYOUTS, randn
from ..messages import FLOATS, here, message, quantised
from .expected import assert_normal, assert_norms


def x(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape or (4, 3), **options)


@contextmanager
def untouched(*tensors: Tensor) -> Iterator[None]:
    """Neither the values nor the versions of tensors change."""
    before = [(t.detach().clone(), t._version) for t in tensors]
    yield
    for t, (values, version) in zip(tensors, before, strict=True):
        assert torch.equal(t, values)
        assert t._version == version


def inference() -> Tensor:
    with torch.inference_mode():
        return x()


def freed() -> Tensor:
    t = x()
    t.untyped_storage().resize_(0)  # as FSDP does
    return t


# id -> (a tensor, error, what the message says)
TENSORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "requires grad": (
        lambda: x(requires_grad=True),
        RuntimeError,
        r"a tensor that does not require grad, or torch\.no_grad\(\)",
    ),
    "not a leaf": (
        lambda: x(requires_grad=True) * 2,
        RuntimeError,
        r"a tensor that does not require grad, or torch\.no_grad\(\)",
    ),
    "of inference mode": (inference, RuntimeError, "a tensor that was not made in inference mode"),
    "freed": (freed, RuntimeError, r"a tensor with memory, got .*\[4, 3\] whose storage was freed"),
    "expanded": (
        lambda: x(1, 3).expand(4, 3),
        ValueError,
        r"elements do not share memory, got .* shape \[4, 3\] and strides \[0, 1\]; call .clone",
    ),
    "overlapping rows": (
        lambda: x(20).as_strided((4, 3), (2, 1)),
        ValueError,
        r"elements do not share memory, got .* strides \[2, 1\]",
    ),
    "overlapping runs": (
        lambda: x(20).as_strided((2, 3, 3), (4, 2, 1)),
        ValueError,
        r"elements do not share memory, got .* strides \[4, 2, 1\]",
    ),
    "integer": (lambda: x(dtype=torch.int32), TypeError, f"dtype {FLOATS}, got torch.int32"),
    "bool": (lambda: x(dtype=torch.bool), TypeError, f"dtype {FLOATS}, got torch.bool"),
    "complex": (lambda: x(dtype=torch.cfloat), TypeError, f"dtype {FLOATS}, got torch.complex64"),
    "float8": (
        lambda: x().to(torch.float8_e4m3fn),
        TypeError,
        f"dtype {FLOATS}, got torch.float8_e4m3fn",
    ),
    "sparse": (lambda: x().to_sparse(), TypeError, "dense strided tensor, got a .*sparse_coo"),
    "CSR": (lambda: x().to_sparse_csr(), TypeError, "dense strided tensor, got a .*sparse_csr"),
    "quantised": (lambda: quantised(x()), TypeError, "dense strided tensor, got a quantized one"),
    "0-d": (lambda: torch.ones(()), ValueError, "at least 1 dimension, got a 0-dimensional"),
    "number": (lambda: 1.0, TypeError, "a torch.Tensor, got float"),
    "list": (lambda: [x()], TypeError, "a torch.Tensor, got list"),
}
OF_NORMS = [name for name in TENSORS if name in ("integer", "sparse", "0-d", "list")]


@pytest.mark.parametrize("case", TENSORS)
def test_a_bad_tensor_in_a_list(backend: str, case: str) -> None:
    """It is named, wherever it stands, and none of the others is written to."""
    make, error, expected = TENSORS[case]
    for place in (0, 1, 3):
        good = [randn((4, 3)), randn((6, 5), torch.float16), randn((2, 2), layout="transposed")]
        tensors = [*good[:place], make(), *good[place:]]
        dims = [0] * 4
        with untouched(*good):
            with pytest.raises(error, match=rf"^tensors\[{place}\]: expected .*{expected}"):
                normalize_(tensors, dims, norm=2.0)
            with pytest.raises(error, match=rf"^tensors\[{place}\]: expected .*{expected}"):
                normalize_(iter(tensors), return_norms=True)


@pytest.mark.parametrize("case", [name for name in TENSORS if name not in ("number", "list")])
def test_a_bad_tensor_alone(backend: str, case: str) -> None:
    make, error, expected = TENSORS[case]
    with pytest.raises(error, match=rf"^tensors: expected .*{expected}"):
        normalize_(make(), None)


@pytest.mark.parametrize("case", OF_NORMS)
def test_norms_of_a_bad_tensor(backend: str, case: str) -> None:
    make, error, expected = TENSORS[case]
    with pytest.raises(error, match=rf"^tensors\[1\]: expected .*{expected}"):
        norms_of([x(), make()])


@pytest.mark.parametrize("tensors", [1.0, None, "weights", torch.nn.Linear(2, 2)], ids=str)
def test_what_is_no_tensor_and_has_none(tensors: Any) -> None:
    got = type(tensors).__name__
    for function in (normalize_, norms_of):
        with pytest.raises(TypeError, match=message("tensors", "a sequence", got)):
            function(tensors)


# id -> (options, error, argument named, expected, got); the options are for one tensor of [4, 3]
OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str, str, str]] = {
    "dim large": ({"dim": 2}, ValueError, "dim", "-2 <= dim < 2 or None", "2"),
    "dim small": ({"dim": -3}, ValueError, "dim", "-2 <= dim < 2 or None", "-3"),
    "dim float": ({"dim": 0.0}, TypeError, "dim", "an int or None", "float"),
    "dim bool": ({"dim": True}, TypeError, "dim", "an int or None", "bool"),
    "dim name": ({"dim": "0"}, TypeError, "dim", "an int or None", "str"),
    "eps negative": ({"eps": -1e-9}, ValueError, "eps", "a finite number >= 0", "-1e-09"),
    "eps NaN": ({"eps": math.nan}, ValueError, "eps", "a finite number >= 0", "nan"),
    "eps infinite": ({"eps": math.inf}, ValueError, "eps", "a finite number >= 0", "inf"),
    "eps None": ({"eps": None}, TypeError, "eps", "a number", "NoneType"),
    "norm negative": ({"norm": -1.0}, ValueError, "norm", "a finite number >= 0", "-1.0"),
    "norm NaN": ({"norm": math.nan}, ValueError, "norm", "a finite number >= 0", "nan"),
    "norm infinite": ({"norm": math.inf}, ValueError, "norm", "a finite number >= 0", "inf"),
    "norm bool": ({"norm": True}, TypeError, "norm", "a number, a Tensor", "bool"),
    "norm None": ({"norm": None}, TypeError, "norm", "a number, a Tensor", "NoneType"),
    "norm complex": ({"norm": 1j}, TypeError, "norm", "a number, a Tensor", "complex"),
    "norm unknown": ({"norm": "unit"}, TypeError, "norm", "'sqrt_numel' or 'keep'", "'unit'"),
    "norm empty": ({"norm": ""}, TypeError, "norm", "'sqrt_numel' or 'keep'", "''"),
    "norm of columns": ({"norm": x(1, 3)}, ValueError, "norm", r"shape \[4, 1\]", r"\[1, 3\]"),
    "norm flat": ({"norm": x(4)}, ValueError, "norm", r"shape \[4, 1\]", r"\[4\]"),
    "norm 0-d": ({"norm": x(1)[0]}, ValueError, "norm", r"shape \[4, 1\]", r"\[\]"),
    "norm of rows": (
        {"dim": None, "norm": x(4, 1)},
        ValueError,
        "norm",
        r"shape \[\] or \[1\]",
        r"\[4, 1\]",
    ),
    "norm integer": ({"norm": x(4, 1).int()}, TypeError, "norm", FLOATS, "torch.int32"),
    "norm sparse": ({"norm": x(4, 1).to_sparse()}, TypeError, "norm", "dense", ".*sparse"),
    "norm elsewhere": (
        {"norm": x(4, 1, device="meta")},
        ValueError,
        "norm",
        f"device {here()}",
        "meta",
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_bad_option(backend: str, case: str) -> None:
    options, error, *pattern = OPTIONS[case]
    t = randn((4, 3))
    with untouched(t), pytest.raises(error, match=message(*pattern)):
        normalize_(t, **options)


@pytest.mark.parametrize("case", OPTIONS)
def test_a_bad_option_of_one_tensor_in_a_list(backend: str, case: str) -> None:
    options, error, name, *pattern = OPTIONS[case]
    good = {"dim": 0, "norm": 1.0, "eps": 0.0}
    lists = {k: [good[k], bad, good[k]] if k != "eps" else bad for k, bad in options.items()}
    named = f"{name}[1]" if name == "norm" else name
    tensors = [randn((4, 3)) for _ in range(3)]
    with untouched(*tensors), pytest.raises(error, match=message(named, *pattern)):
        normalize_(tensors, **lists)


@pytest.mark.parametrize("name", ["dim", "norm"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_dims_or_norms(name: str, count: int) -> None:
    tensors = [randn((4, 3)), randn((4, 3))]
    with (
        untouched(*tensors),
        pytest.raises(ValueError, match=message(name, r"2 entries \(one per tensor\)", f"{count}")),
    ):
        normalize_(tensors, **{name: [0] * count})
    if name == "dim":
        with pytest.raises(ValueError, match=message(name, "2 entries", f"{count}")):
            norms_of(tensors, [0] * count)


def test_keep_without_norms() -> None:
    t, other = randn((4, 3)), randn((4, 3))
    norms_of([t, other], [0, 1])
    expected = re.escape("norm: 'keep' expects that norms_of was called before with the tensor of")
    for call in (
        lambda: normalize_([t, randn((4, 3))], norm="keep"),
        lambda: normalize_([t, other], norm="keep"),  # of another dim
        lambda: normalize_(t, None, norm=["keep"]),
        lambda: normalize_(t.detach(), norm="keep"),
        lambda: normalize_(copy.deepcopy(t), norm="keep"),
    ):
        with untouched(t, other), pytest.raises(ValueError, match=rf"^{expected} shape \[4, 3\]"):
            call()


# Memory that is shared


SHARED: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "a tensor twice": lambda t: [t, t],
    "a view of it": lambda t: [t, t.view(3, 8)],
    "a part of it": lambda t: [t, t[2:4]],
    "overlapping parts": lambda t: [t[:4], t[3:]],
    "another dtype": lambda t: [t, t.view(torch.float64)],
    "with gaps": lambda t: [t[:, ::2], t[4:, 2:3]],
    "detached": lambda t: [t, t.detach()],
}


@pytest.mark.parametrize("case", SHARED)
def test_tensors_that_share_memory(backend: str, case: str) -> None:
    """Wherever they stand in a list."""
    t, other = randn((6, 4)), randn((6, 4))
    first, second = SHARED[case](t)
    for tensors, names in (
        ([first, second, other], r"tensors\[[01]\] and tensors\[[01]\]"),
        ([second, other, first], r"tensors\[[02]\] and tensors\[[02]\]"),
    ):
        match = rf"^tensors: expected tensors that do not share memory, but {names} do, or"
        with untouched(t, other), pytest.raises(ValueError, match=match):
            normalize_(tensors)


def test_parts_of_a_tensor_that_share_nothing(route: str) -> None:
    t = randn((6, 4))
    before = t.clone()
    normalize_([t[4:], t[:2], t[2:4], t[:0], t[:0]])
    assert_normal(t, before, 0, 1.0)


@pytest.mark.parametrize("layout", ["transposed", "gaps"])
def test_a_norm_in_the_memory_that_is_written(route: str, layout: str) -> None:
    """It counts as it was."""
    shape = LAYOUTS[layout]
    t = randn(shape, layout=layout)
    before = t.clone()
    normalize_(t, 0, norm=t[:, :1, 2:3])
    assert_normal(t, before, 0, before[:, :1, 2:3])
    tensors = [randn(shape, layout=layout), randn((5, 7)).t()]
    before = [u.clone() for u in tensors]
    normalize_(tensors, norm=[tensors[1][:, :1, None], tensors[0][:, 0, :1]])
    norms = [before[1][:, :1, None], before[0][:, 0, :1]]
    for t, u, norm in zip(tensors, before, norms, strict=True):
        assert_normal(t, u, 0, norm)


# Places


def test_tensors_on_two_devices(route: str) -> None:
    """Those without values have shapes, and nothing else."""
    t, meta = randn((4, 3)), torch.empty(5, 2, device="meta", dtype=torch.float16)
    before, version = t.clone(), t._version
    norms = [x(1, 2, device="meta"), x(4, 1)]
    found = normalize_([meta, t], [1, 0], norm=norms, return_norms=True)
    assert_normal(t, before, 0, 1.0)
    assert_norms(found[1], before, 0)
    assert found[0].is_meta
    assert found[0].shape == (1, 2)
    assert found[0].dtype == torch.float32
    assert (t._version, meta._version) == (version + 1, 1)
    assert norms_of(meta, None).is_meta


def test_a_backend_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for before anything is written, on any device."""
    monkeypatch.setattr(BACKENDS["eager"], "takes", lambda v: False)
    monkeypatch.setattr(BACKENDS["eager"], "reasons", lambda v: ["it sleeps"])
    tensors = [torch.empty(2, 3, device="meta"), randn((4, 3)), randn((2, 2))]
    with (
        wnkernel.use_backend("eager"),
        untouched(*tensors[1:]),
        pytest.raises(RuntimeError, match="'eager' was asked for and cannot run: it sleeps"),
    ):
        normalize_(tensors)
    assert tensors[0]._version == 0


# The operator


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ({"g": [x(4, 1)]}, "^g: expected"),
        ({"dim": [0, 0, 0]}, "^dim: expected"),
        ({"eps": []}, "^eps: expected"),
        ({"g": [x(4, 1), x(3, 1)]}, r"^g: expected shape \[4, 1\]"),
        ({"dim": [0, 2]}, "^dim: expected"),
        ({"eps": [0.0, math.nan]}, "^eps: expected a finite number"),
        ({"v": [x(), x(4, 6)[:, ::2]]}, r"^v: expected .* without gaps .* strides \[6, 2\]"),
        ({"v": [x(), x(1, 3).expand(4, 3)]}, r"^v: expected .* without gaps .* strides \[0, 1\]"),
        ({"v": [x(), x(dtype=torch.int32)]}, "^v: expected dtype"),
        ({"v": [x(), freed()]}, "^v: expected a tensor with memory"),
    ],
)
def test_operator(compiled_backend: str, ops: Any, other: dict[str, Any], match: str) -> None:
    """The checks are done before the first tensor is written."""
    arguments = {"v": [x(), x()], "g": [x(4, 1), x(4, 1)], "dim": [0, 0], "eps": [0.0, 0.0]}
    arguments |= other
    with (
        untouched(arguments["v"][0]),
        pytest.raises((TypeError, ValueError, RuntimeError), match=match),
    ):
        ops.normalize_(*arguments.values())
