"""Checkpoints as torch itself writes them: the same weight in each of the three key layouts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import wnkernel

from . import reference
from .layers import APPLY

LAYOUTS = ["parametrized", "legacy", "folded"]
all_layouts = pytest.mark.parametrize("layout", LAYOUTS)

KINDS = {"parametrized": "torch", "legacy": "legacy", "folded": "legacy"}
"""Which of torch's weight norms writes the layout; the folded one does after its removal."""


def saved(
    plain: nn.Module, layout: str, name: str = "weight", dim: int | None = 0
) -> dict[str, Tensor]:
    """The state dict of a layer that torch normed. Its g is not the norm of its v."""
    layer = APPLY[KINDS[layout]](copy.deepcopy(plain), name, dim)
    g = dict(layer.named_parameters())[g_and_v(name, KINDS[layout])[0]]
    with torch.no_grad():
        g.mul_(torch.linspace(0.5, 2.0, g.numel()).view(g.shape))
    if layout == "folded":
        nn.utils.remove_weight_norm(layer, name)
    return layer.state_dict()


def g_and_v(name: str = "weight", kind: str = "torch", prefix: str = "") -> tuple[str, str]:
    """Keys, spelled out: not by the code that is tested."""
    if kind == "legacy":
        return f"{prefix}{name}_g", f"{prefix}{name}_v"
    below = f"{prefix}parametrizations.{name}"
    return f"{below}.original0", f"{below}.original1"


def expected(
    checkpoint: Mapping[str, Tensor], layout: str, name: str = "weight", dim: int | None = 0
) -> tuple[Tensor, Tensor]:
    """g and v of a layer that has loaded a checkpoint of :func:`saved`."""
    if layout == "folded":
        w = checkpoint[name]
        return reference.norm(w, dim).to(w.dtype), w
    g, v = g_and_v(name, KINDS[layout])
    return checkpoint[g], checkpoint[v]


def assert_loaded(
    layer: nn.Module,
    checkpoint: Mapping[str, Tensor],
    layout: str,
    name: str = "weight",
    dim: int | None = 0,
) -> None:
    """g and v are those of the checkpoint, to the last bit. The norms of a folded weight are those
    of float64 up to rounding: torch's own may be less accurate, and what a kernel divides by is."""
    (g, v), (want_g, want_v) = loaded(layer, name), expected(checkpoint, layout, name, dim)
    assert torch.equal(v, want_v)
    if layout == "folded":
        rtol = 4 * torch.finfo(g.dtype).eps
        torch.testing.assert_close(g.detach(), want_g, rtol=rtol, atol=0)
    else:
        assert torch.equal(g, want_g)


def loaded(layer: nn.Module, name: str = "weight") -> tuple[Tensor, Tensor]:
    """g and v of a layer of any kind."""
    state = layer.state_dict()
    kind = "legacy" if f"{name}_v" in state else "torch"
    g, v = (state[key] for key in g_and_v(name, kind))
    return g, v


@contextmanager
def unchanged(*dicts: Mapping[str, object]) -> Iterator[None]:
    """Holds dicts to their keys, order, objects and values."""
    before = [[(k, t, copy.deepcopy(t)) for k, t in d.items()] for d in dicts]
    yield
    for d, entries in zip(dicts, before, strict=True):
        assert list(d) == [key for key, *_ in entries]
        for key, t, value in entries:
            assert d[key] is t, key
            if isinstance(t, Tensor) and not t.is_meta:
                assert torch.equal(_comparable(t), _comparable(value)), key


def _comparable(t: Tensor) -> Tensor:
    """Its values; bits where torch 2.4 cannot compare those of a type."""
    is_narrow = t.is_floating_point() and t.element_size() == 1
    return t.view(torch.uint8) if is_narrow else t.to_dense()


@contextmanager
def nothing_loaded(*layers: nn.Module) -> Iterator[None]:
    """Holds layers to the parameters that they have, and to their values."""
    before = [(dict(m.named_parameters()), copy.deepcopy(m.state_dict())) for m in layers]
    yield
    for layer, (parameters, state) in zip(layers, before, strict=True):
        for key, p in layer.named_parameters():
            assert p is parameters[key], key
            assert torch.equal(p, state[key]), key


def load_error(load: Callable[[], object]) -> str:
    """What loading says."""
    with pytest.raises(RuntimeError, match=r"^Error\(s\) in loading state_dict for") as raised:
        load()
    return str(raised.value)


def ours(plain: nn.Module, name: str = "weight", dim: int | None = 0) -> nn.Module:
    """The layer under test, with values of its own."""
    layer = wnkernel.weight_norm(copy.deepcopy(plain), name, dim)
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(0.25)
    return layer
