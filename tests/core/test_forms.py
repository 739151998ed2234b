"""The memory of checks: what a form depends on, and that nothing bad passes for something known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from wnkernel import forms
from wnkernel.forms import Problems, forms_of, known, known_list, spread
from wnkernel.problem import check

from ..messages import message, quantised

V, G = torch.ones(4, 6, 3), torch.ones(4, 1, 1)
GOOD: tuple[Any, ...] = (V, G, 0, 0.5, None)


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "_known", {})


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A list that grows with every call of check()."""
    calls: list[tuple[Any, ...]] = []

    def counted(*weight: Any, **options: Any) -> Any:
        calls.append(weight)
        return check(*weight, **options)

    monkeypatch.setattr(forms, "check", counted)
    return calls


def form_of(v: Tensor, g: Tensor, dim: Any = 0, eps: Any = 0.0, out_dtype: Any = None) -> object:
    (form,) = forms_of([v], [g], [dim], [eps], [out_dtype])
    return form


def test_weights_of_one_form_are_checked_once(checks):
    for k in range(3):
        v, g = torch.randn(4, 6, 3), nn.Parameter(torch.randn(4, 1, 1))
        problems = known(v, g, *GOOD[2:])
        assert problems.v[0] is v
        assert problems.g[0] is g
        known_list([v] * k, [g] * k, [0] * k, [0.5] * k, None) if k else None
    assert len(checks) == 1


def test_one_weight_and_lists_share_their_memory(checks):
    (form,) = known(*GOOD).forms
    assert known_list(*([x] for x in GOOD[:4]), None).forms == [form]
    assert forms_of(*([x] for x in GOOD)) == [form]
    assert len(checks) == 1


OTHERS = {
    "size of v": (torch.ones(4, 3, 6), *GOOD[1:]),
    "strides of v": (torch.ones(4, 3, 6).transpose(1, 2), *GOOD[1:]),
    "dtype of v": (V.half(), *GOOD[1:]),
    "negated v": (torch._neg_view(V), *GOOD[1:]),
    "dtype of g": (V, G.double(), *GOOD[2:]),
    "strides of g": (V, torch.ones(4, 2, 1)[:, :1], *GOOD[2:]),
    "negated g": (V, torch._neg_view(G), *GOOD[2:]),
    "device": (V.to("meta"), G.to("meta"), *GOOD[2:]),
    "eps": (V, G, 0, 0.25, None),
    "out_dtype": (V, G, 0, 0.5, torch.bfloat16),
}
"""Each differs from GOOD in one thing."""


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_everything_that_matters_makes_another_form(other):
    form = form_of(*GOOD)
    assert form_of(*other) is not form
    assert form_of(*GOOD) is form
    assert form_of(*other) is form_of(*other)


def test_a_cube_has_a_form_for_every_dim():
    v, g = torch.ones(1, 1, 1), torch.ones(1, 1, 1)
    assert len({form_of(v, g, dim) for dim in range(3)}) == 3


@pytest.mark.parametrize(("dim", "same"), [(None, -1), (1, -2), (0, -3)])
def test_names_of_one_dim_share_a_form(dim, same):
    v = torch.ones(4, 6, 3)
    g = (
        torch.ones(())
        if dim is None
        else torch.ones([n if k == dim else 1 for k, n in enumerate(v.shape)])
    )
    assert form_of(v, g, dim) is form_of(v, g, same)
    assert form_of(v, g, dim, 0) is form_of(v, g, dim, 0.0)
    assert form_of(v, g, dim, 0.0, v.dtype) is form_of(v, g, dim)


def test_data_that_was_replaced_makes_another_form():
    """Without a trace in the version counter, and with storage and address as before."""
    v = nn.Parameter(torch.ones(4, 4))
    g, version = torch.ones(4, 1), v._version
    form = form_of(v, g)
    v.data = v.data.t()
    assert v._version == version
    assert form_of(v, g) is not form
    v.data = torch.ones(4, 4)
    assert form_of(v, g) is form


BAD = {
    "bool dim": ((V, torch.ones(1, 6, 1), True, 0.5, None), TypeError, "dim", "an int", "bool"),
    "float dim": ((V, torch.ones(1, 6, 1), 1.0, 0.5, None), TypeError, "dim", "an int", "float"),
    "numpy eps": ((V, G, 0, np.float32(0.5), None), TypeError, "eps", "a number", "float32"),
    "no hash": ((V, G, [0], 0.5, None), TypeError, "dim", "an int", "list"),
    "g": ((V, G[:3], 0, 0.5, None), ValueError, "g", r"shape \[4, 1, 1\]", r"\[3, 1, 1\]"),
    "out_dtype": ((V, G, 0, 0.5, torch.int8), TypeError, "out_dtype", "float", "int8"),
    "sparse": ((V.to_sparse(), G, 0, 0.5, None), TypeError, "v", "dense", "sparse"),
    "no tensor": (([1.0], G, 0, 0.5, None), TypeError, "v", "Tensor", "list"),
    "device": ((V, G.to("meta"), 0, 0.5, None), ValueError, "g", "device cpu", "meta"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_weights_are_named_also_among_known_ones(name):
    """True and 1.0 are 1 in a dict, and numpy's 0.5 is 0.5."""
    arguments, error, *expected = BAD[name]
    known(*GOOD)
    known(V, torch.ones(1, 6, 1), 1, 0.5, None)
    for _ in range(2):
        with pytest.raises(error, match=message(*expected)):
            known(*arguments)
        with pytest.raises(error, match=message(*expected)):
            known_list(*map(list, zip(GOOD[:4], arguments[:4], strict=True)), arguments[4])


def test_quantised_weights_are_no_known_ones():
    known(*GOOD)
    with pytest.raises(TypeError, match=message("v", "dense", "quantized")):
        known(quantised(V), *GOOD[1:])


def test_weights_on_two_devices_are_told_apart_from_memory():
    meta = V.to("meta"), G.to("meta")
    for _ in range(2):
        with pytest.raises(ValueError, match="v: expected all on cpu, entry 1 is on meta"):
            known_list([V, meta[0]], [G, meta[1]], [0, 0], [0.5, 0.5], None)


class Own(nn.Parameter):
    """A class of somebody else's."""


def test_what_is_no_plain_tensor_is_checked_every_time(checks, monkeypatch):
    def nobody(*weight: Any) -> None:
        raise AssertionError(weight)

    monkeypatch.setattr(forms, "_checked", nobody)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    for v in (Own(V), fake.from_tensor(V)):
        (p,) = known(v, G, *GOOD[2:])
        assert p.v is v
        assert known_list([v], [G], [0], [0.5], None)[0].dim == 0
    with fake:  # whoever made this mode wants to see operators
        known(*GOOD)
    assert len(checks) == 3


def test_forms_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(forms, "KEPT", 8)
    for n in range(1, 40):
        known(torch.ones(n, 2), torch.ones(n, 1), 0, 0.0, None)
        assert len(forms._known) <= 9


def test_forms_hold_no_tensors():
    form = form_of(*GOOD)
    assert not [x for name in form.__slots__ for x in (getattr(form, name),) if torch.is_tensor(x)]


def problems_of(count: int) -> Problems:
    return known_list(
        [torch.ones(k + 1, 2) for k in range(count)],
        [torch.ones(k + 1, 1) for k in range(count)],
        [0] * count,
        [0.5] * count,
        torch.bfloat16,
    )


def test_columns_are_a_sequence_of_problems():
    columns = problems_of(4)
    listed = list(columns)
    assert len(columns) == len(listed) == 4
    assert [p.v.shape[0] for p in listed] == [1, 2, 3, 4]
    assert {(p.dim, p.eps, p.out_dtype) for p in columns} == {(0, 0.5, torch.bfloat16)}
    assert columns[-1].v is columns.v[3]
    assert [p.v.shape[0] for p in columns[1:3]] == [2, 3]
    with pytest.raises(IndexError):
        columns[4]


def test_columns_of_problems_and_some_of_them():
    columns = problems_of(4)
    assert Problems.of(columns) is columns
    again = Problems.of(list(columns))
    assert again.forms == columns.forms
    assert again.at([3, 1]).forms == [columns.forms[3], columns.forms[1]]
    assert columns.at([2]).g[0] is columns.g[2]


def test_the_forms_of_now_may_be_others():
    columns = problems_of(2)
    before = list(columns.forms)
    columns.v[1].data = torch.ones(2, 4)[:, ::2]
    first, second = columns.forms_now()
    assert first is before[0]
    assert second is not before[1]
    assert columns.forms == before
    assert columns.forms_now([torch.float32] * 2)[0].options == (0, 0.5, torch.float32)


def test_columns_are_spread():
    assert spread(["b", "d"], [1, 3], 5) == [None, "b", None, "d", None]
    column = ["a", "b"]
    assert spread(column, [0, 1], 2) is column
