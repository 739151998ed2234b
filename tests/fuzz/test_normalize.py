"""normalize_ of any list of tensors of any shapes, memory orders, dtypes and norms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import wnkernel
from wnkernel import normalize_
from wnkernel.backends import BACKENDS

from .. import reference
from ..normalize.expected import assert_norms, scaled
from . import cases
from .weights import Weight, weights

HERE = torch.empty(0, device="cpu")
RUN = [name for name in ("cpu", "eager") if not BACKENDS[name].reasons(HERE)]
lists = st.lists(weights(most=(60, 2000)), min_size=1, max_size=5)


@pytest.mark.parametrize("name", RUN)
@settings(max_examples=cases(60), derandomize=not cases(0))
@given(lists, st.sampled_from([0.0, 1e-12, 1.0]))
def test_any_list(name: str, xs: list[Weight], eps: float) -> None:
    vs, norms, _ = (list(ts) for ts in zip(*(x.tensors() for x in xs), strict=True))
    dims, before = [x.dim for x in xs], [v.detach().clone() for v in vs]
    with wnkernel.use_backend(name), torch.no_grad():
        found = normalize_(vs, dims, norm=norms, eps=eps, return_norms=True)
    for v, b, dim, r, n in zip(vs, before, dims, norms, found, strict=True):
        reference.assert_close("v", v, scaled(b, dim, r.detach(), eps))
        assert_norms(n, b, dim)
