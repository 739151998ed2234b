"""When two entries of a state dict are one weight: to the bit, or up to rounding and no further."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import wnkernel
from wnkernel.checkpoint.agreement import infer_dim, same_bits, same_up_to_rounding
from wnkernel.splitting import split_for_torch

from ..cases import randn
from ..checkpoints import g_and_v

ROUNDING = {torch.float32: 16, torch.float64: 16, torch.float16: 2, torch.bfloat16: 2}
"""By how many units in the last place two kernels may differ. Halves are of sums in float32, whose
order does not show."""


@pytest.mark.parametrize("other", ROUNDING)
@pytest.mark.parametrize("dtype", ROUNDING)
def test_rounding_is_that_of_the_wider_error(dtype: torch.dtype, other: torch.dtype) -> None:
    one = torch.ones(2, 3, dtype=other)
    unit = torch.finfo(dtype).eps
    allowed = max(unit * ROUNDING[dtype], torch.finfo(other).eps * ROUNDING[other]) / unit
    off = one.to(dtype, copy=True)
    off[1, 1] += allowed * unit
    assert same_up_to_rounding(off, one)
    off[1, 1] += max(1.0, 0.02 * allowed) * unit
    assert not same_up_to_rounding(off, one)


def test_nan_and_inf_are_themselves_up_to_rounding() -> None:
    t = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
    assert same_up_to_rounding(t, t.clone())
    for k, value in ((0, 1.0), (1, -torch.inf), (1, 1.0), (2, 1.0), (3, 1e-30)):
        other = t.clone()
        other[k] = value
        assert not same_up_to_rounding(t, other)
        assert not same_up_to_rounding(other, t)
    assert not same_up_to_rounding(t, t[:3])


def test_bits_are_the_same() -> None:
    t = torch.tensor([0.0, torch.nan])
    assert same_bits(t, t)
    assert same_bits(t, t.clone())
    assert not same_bits(t, -t)
    assert not same_bits(t, t[:1])
    assert not same_bits(t, t.double())


@pytest.mark.parametrize("same", [same_bits, same_up_to_rounding])
def test_of_tensors_without_values_the_shape_decides(
    same: Callable[[Tensor, Tensor], bool],
) -> None:
    t = torch.randn(2, 3)
    for one, other in ((t, t.to("meta")), (t.to("meta"), t), (t.to("meta"), t.to("meta"))):
        assert same(one, other) is True
        assert not same(one, other[:1])


@pytest.mark.parametrize("to", ["legacy", "parametrized", "folded"])
def test_one_tensor_under_two_names(to: str) -> None:
    """As after ``state_dict | state_dict`` of two layouts. NaN is itself."""
    g, v = torch.rand(4, 1), torch.randn(4, 3)
    v[1, 1] = torch.nan
    both = dict(zip((*g_and_v(), *g_and_v(kind="legacy")), (g, v, g, v), strict=True))
    converted = wnkernel.convert_state_dict(both, to)
    assert len(converted) == (1 if to == "folded" else 2)


def test_a_g_of_one_element_has_as_many_dims_as_v_or_none_or_one() -> None:
    v = torch.Size((3, 4, 5))
    dims = [infer_dim(torch.Size((1,) * n), v) for n in range(5)]
    assert dims == [-1, -1, None, -1, None]
    assert infer_dim(torch.Size(()), torch.Size(())) is None


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_torch_computes_the_weight_from_what_is_split_for_it(dim: int, size: float) -> None:
    """To the bit on the dims where it has a kernel. Long rows, of which its norms are far off."""
    w = size * randn((2, 3000, 2) if dim == 1 else (2, 3, 3000)[:: -1 if dim == 2 else 1])
    g, v = split_for_torch(w, dim)
    assert v is w
    got: Tensor = torch._weight_norm(v, g, dim)
    assert torch.equal(got, w) if dim != 1 else torch.allclose(got, w, rtol=3e-7, atol=0)


def test_a_weight_without_elements_is_split() -> None:
    g, v = split_for_torch(torch.empty(4, 0), 0)
    assert g.tolist() == [[0.0]] * 4
    assert v.shape == (4, 0)
