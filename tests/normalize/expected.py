"""What normalize_ has to write and to return, by the words of its docstring."""

from __future__ import annotations

import torch
from torch import Tensor

import wnkernel
from wnkernel.problem import accumulation_dtype

from .. import reference
from ..cases import g_shape


def scaled(x: Tensor, dim: int | None, r: Tensor | float, eps: float = 0.0) -> reference.Expected:
    """``r * x / max(norm, eps)`` in float64, where rows of zeros stay."""
    length, acc = reference.length(x, dim), reference.acc_dtype(x)
    r = torch.as_tensor(r, dtype=torch.float64, device=x.device)
    # Of subnormal numbers, norms in float64 have few digits.
    unit = 2.0**200 if x.numel() and x.abs().max() < 1e-250 else 1.0
    x = x.double() * unit
    norm = reference.norm(x, dim)
    y = x / torch.where(norm == 0, 1.0, norm.clamp_min(eps * unit)) * r
    return reference.Expected(y, y.abs(), length, acc)


def assert_normal(
    x: Tensor,
    before: Tensor,
    dim: int | None = 0,
    r: Tensor | float = 1.0,
    eps: float = 0.0,
) -> None:
    """``x`` is what normalize_ makes of ``before``."""
    reference.assert_close("x", x, scaled(before, dim, r, eps))


def assert_norms(found: Tensor, x: Tensor, dim: int | None) -> None:
    """They are those of ``x``, in the dtype and shape that the docstrings promise."""
    want = reference.norm(x, dim)
    assert found.dtype == accumulation_dtype(x.dtype)
    assert found.shape == g_shape(x.shape, dim)
    assert not found.requires_grad
    length, acc = reference.length(x, dim), reference.acc_dtype(x)
    reference.assert_close("norms", found, reference.Expected(want, want, length, acc))


def assert_normalizes(
    x: Tensor,
    dim: int | None = 0,
    norm: float | str | Tensor = 1.0,
    eps: float = 0.0,
    r: float | Tensor | None = None,
) -> None:
    """Call normalize_ on a tensor, and look at everything that it does. ``r``: what ``norm``
    stands for, if it is a name."""
    before, version, place = x.clone(), x._version, (x.data_ptr(), x.stride())
    found = wnkernel.normalize_(x, dim, norm=norm, eps=eps, return_norms=True)
    assert_normal(x, before, dim, norm if r is None else r, eps)
    assert_norms(found, before, dim)
    assert (x.data_ptr(), x.stride()) == place
    assert x._version == version + 1
