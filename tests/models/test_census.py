"""What the census says of a weight: whether two are computed alike, and which hooks are torch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm as torch_weight_norm

import wnkernel
from wnkernel.census import TORCH_HOOK, census, legacy_hooks, normed_in


class Doubled(wnkernel.WeightNorm):
    """Computes another weight than its class."""

    def forward(self, g: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(g, v)


def square(norm=wnkernel.weight_norm, **options) -> nn.Module:
    return norm(nn.Linear(4, 4, bias=False), **options)


def tied(first: nn.Module, second: nn.Module, *names: str) -> bool:
    """Whether two layers are computed alike once the second has some originals of the first."""
    lists = [layer.parametrizations.weight for layer in (first, second)]
    for name in names:
        setattr(lists[1], name, getattr(lists[0], name))
    sources = {normed.source() for layer in (first, second) for normed in census(layer)}
    return len(sources) == 1


G_AND_V = ("original0", "original1")


def test_weights_of_the_same_g_and_v_are_computed_alike():
    assert tied(square(), square(), *G_AND_V)
    assert tied(square(torch_weight_norm), square(torch_weight_norm), *G_AND_V)


@pytest.mark.parametrize("name", G_AND_V)
def test_of_one_tensor_alone_they_are_not(name):
    assert not tied(square(), square(), name)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(lambda: square(dim=1), id="dim"),
        pytest.param(lambda: square(eps=1e-3), id="eps"),
        pytest.param(lambda: square(torch_weight_norm), id="kind"),
    ],
)
def test_nor_where_anything_else_differs(other):
    assert not tied(square(), other(), *G_AND_V)


def test_what_is_not_exact_is_like_nothing_else():
    layer = nn.Module()
    for name in ("a", "b"):
        layer.register_parameter(name, nn.Parameter(torch.ones(3, 3)))
        wnkernel.weight_norm(layer, name)
        layer.parametrizations[name][0].__class__ = Doubled
    found = census(layer)
    assert [normed.is_exact for normed in found] == [False, False]
    assert len({normed.source() for normed in found}) == 2


def test_a_hook_of_torch_is_first_and_a_hook_of_ours_is_none_of_them():
    """Ours only answers torch's remove_weight_norm."""
    (hooked,) = normed_in(square(torch.nn.utils.weight_norm)).values()
    assert (hooked.kind, hooked.is_first, hooked.is_alone) == (TORCH_HOOK, True, True)
    layer = square()
    assert legacy_hooks(layer) == {}
