"""The contenders: their names, and how they compute weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import wnkernel

from .shapes import LayerCase

OURS = "wnkernel"
TORCH = "torch"  # torch's own weight norm: the operator, or the parametrization of a layer.
LEGACY = "torch legacy hook"
COPY = "copy_"  # The yardstick: it copies v's bytes into memory that exists already.
FUSED = "fused"  # wnkernel after ``fuse(model)``: one launch computes all weights.
VERSION = "fused, version"  # ``reuse="version"``, with parameters that change in every iteration.
UNCHANGED = "fused, version, unchanged"  # The same, but weights are read and not computed again.
READ_WRITE = "one read, one write"  # The yardstick in place: it multiplies all tensors by 1.
LEAST = "least traffic"  # The yardstick of forced weights: plain passes over the same bytes.
FOREACH = "torch foreach"  # torch's functions for lists of tensors.
PLAIN = "no weight norm"  # The same model with folded weights.
COMPILED = ", compiled"  # The name of a contender gets this suffix after torch.compile.
ENGINE = "engine"  # autograd's engine, which runs nodes without any operator.
KINDS = (OURS, TORCH, LEGACY)  # The weight norms that a single layer can carry.
# All contenders that wnkernel computes.
OWN = (OURS, FUSED, VERSION, UNCHANGED, OURS + COMPILED, FUSED + COMPILED)
BY_CASE = {
    "models": KINDS,
    "host": (*KINDS, UNCHANGED),
    "fused": (TORCH, OURS, FUSED, VERSION, UNCHANGED),
    "flat": (TORCH, OURS, FUSED, VERSION),
    "gan": (TORCH, OURS, FUSED, VERSION, PLAIN),
    "memory": (TORCH, OURS, FUSED, VERSION, PLAIN),
    "compile": (TORCH, TORCH + COMPILED, LEGACY, OURS, FUSED, OURS + COMPILED, FUSED + COMPILED),
    "steps": (TORCH, OURS, FUSED, PLAIN),  # Of "compile"; each runs eager and compiled.
    "whole": (TORCH, OURS, FUSED),
    "normalize": (OURS, FUSED, TORCH, FOREACH, TORCH + COMPILED),
}
"""The contenders of each case of several layers or kinds."""
NAME = "weight"  # The parameter that has the weight norm in every model here.


def operators(dim: int | None) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Return the contenders as functions of v and g."""
    torch_dim = -1 if dim is None else dim
    return {
        OURS: lambda v, g: wnkernel.functional.weight_norm(v, g, dim),
        TORCH: lambda v, g: torch._weight_norm(v, g, torch_dim),
    }


def _legacy(module: nn.Module, name: str, dim: int) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, but many models use it
        return torch.nn.utils.weight_norm(module, name, dim)


@dataclass(frozen=True)
class Way:
    """How a contender computes the weights of a model."""

    apply: Callable[[nn.Module, str, int], nn.Module] = wnkernel.weight_norm  # For one layer.
    reuse: str | None = None  # With None every weight is computed alone.
    changing: bool = True  # Whether parameters count as changed after every iteration.
    compiled: bool = False  # Whether torch.compile makes one graph of all reads.
    folded: bool = False


WAYS = {
    OURS: Way(),
    TORCH: Way(parametrizations.weight_norm),
    LEGACY: Way(_legacy),
    FUSED: Way(reuse="forward"),
    VERSION: Way(reuse="version"),
    UNCHANGED: Way(reuse="version", changing=False),
    PLAIN: Way(folded=True),
}
WAYS |= {who + COMPILED: replace(WAYS[who], compiled=True) for who in (TORCH, OURS, FUSED)}


@dataclass(frozen=True)
class NormedLayer:
    """A weight-normed layer: its two parameters, and a function that computes its weight anew."""

    module: nn.Module
    v: nn.Parameter
    g: nn.Parameter
    dim: int | None
    weight: Callable[[], Tensor]


def apply(who: str, module: nn.Module, dim: int | None) -> NormedLayer:
    """Put a contender's weight norm on the weight of a plain layer."""
    WAYS[who].apply(module, NAME, -1 if dim is None else dim)
    if who != LEGACY:
        originals = module.parametrizations[NAME]
        v, g = originals.original1, originals.original0
        return NormedLayer(module, v, g, dim, lambda: module.weight)
    (hook,) = (h for h in module._forward_pre_hooks.values() if getattr(h, "name", "") == NAME)

    def weight() -> Tensor:
        hook(module, None)
        return module.weight

    return NormedLayer(module, module.weight_v, module.weight_g, dim, weight)


@dataclass(frozen=True)
class Normed:
    """A model with weight norms, computed as one contender does it."""

    model: nn.Module  # A group lives as long as its model.
    modules: Sequence[nn.Module]  # The layers whose weight is normed, or was until it was folded.
    layers: Sequence[NormedLayer]  # Empty if the weights were folded.
    scope: Callable[[], AbstractContextManager[None]]  # Surrounds a forward.
    changed: Callable[[], None]  # Stands for an optimizer that wrote to the parameters.
    way: Way

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All v and g, or the folded weights."""
        if self.way.folded:
            return [module.weight for module in self.modules]
        return [p for layer in self.layers for p in (layer.v, layer.g)]


def norm(who: str, model: nn.Module, convs: Sequence[tuple[nn.Module, int | None]]) -> Normed:
    """Put a contender's weight norm on layers of a model, each with its dim, in place. v is the
    weight, and g is its norm times random factors that are the same for every contender: results
    with ``w = v`` would prove nothing."""
    way = WAYS[who]
    modules = [module for module, _ in convs]
    layers = [apply(who, module, dim) for module, dim in convs]
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in layers:
            layer.g.mul_((0.8 + 0.4 * torch.rand(layer.g.shape, generator=random)).to(layer.g))
    if way.folded:
        for module in modules:
            wnkernel.remove_weight_norm(module)
        layers = []
    if way.reuse is None:
        return Normed(model, modules, layers, nullcontext, int, way)  # int() does nothing
    group = wnkernel.fuse(model, reuse=way.reuse)
    # Without an optimizer, only a refresh tells this mode about the change.
    changed = group.refresh if way.changing and way.reuse == "version" else int
    return Normed(model, modules, layers, group.scope, changed, way)


def stripped(model: nn.Module) -> Callable[[str], Normed]:
    """Take torch's weight norms off ``model``, in place. Return a function that copies the model
    and puts a contender's weight norm on the same layers. (A copy of a parametrized layer would
    share its class with the original, and torch's ``remove_parametrizations`` on either one takes
    the property from both.)"""
    dims: dict[str, int | None] = {}
    for name, module in list(model.named_modules()):
        if parametrize.is_parametrized(module, NAME):
            first = module.parametrizations[NAME][0]
            if type(first).__name__ == "_WeightNorm":
                dims[name] = None if first.dim == -1 else first.dim
                parametrize.remove_parametrizations(module, NAME)

    def normed(who: str) -> Normed:
        own = copy.deepcopy(model)
        return norm(who, own, [(own.get_submodule(name), dim) for name, dim in dims.items()])

    return normed


def weights_model(who: str, cases: Sequence[LayerCase], device: torch.device) -> Normed:
    """Make a model of layers that have only a weight, the same for every contender."""
    random = torch.Generator().manual_seed(0)
    model = nn.ModuleList(nn.Module() for _ in cases)
    for layer, case in zip(model, cases, strict=True):
        layer.weight = nn.Parameter(torch.randn(case.shape, generator=random).to(device))
    return norm(who, model, [(m, c.dim) for m, c in zip(model, cases, strict=True)])


def random_grads(weights: Sequence[Tensor]) -> list[Tensor]:
    """Return one gradient for each weight."""
    random = torch.Generator().manual_seed(2)
    return [torch.randn(w.shape, generator=random).to(w.device) for w in weights]


class Of(NamedTuple):
    """The results for one layer."""

    w: Tensor
    grad_v: Tensor
    grad_g: Tensor


class Pass:
    """Reads all weights of a model in one scope, and takes the gradients of all v and g. It
    launches only weight norms: there is no loss and no ``.grad``."""

    def __init__(self, normed: Normed, grads: list[Tensor]) -> None:
        self.normed, self.grads, self.parameters = normed, grads, normed.parameters
        self.read: Callable[[], list[Tensor]] = lambda: [x.weight() for x in normed.layers]
        if normed.way.compiled:  # one graph, with the guards of a model's graph
            modules = normed.modules
            once = torch.compile(fullgraph=True, dynamic=False)
            self.read = once(lambda: [m.weight for m in modules])

    def __call__(self) -> tuple[Tensor, ...]:
        with self.normed.scope():
            weights = self.read()
        return (*weights, *torch.autograd.grad(weights, self.parameters, self.grads))

    def results(self) -> list[Of]:
        """Return the results of one more pass."""
        out, n = self(), len(self.grads)
        return list(map(Of, out[:n], out[n::2], out[n + 1 :: 2]))


class Iteration(Pass):
    """Does what a training step does about weight norms: reads all weights in one scope, takes all
    gradients in one backward, and drops them. The backward has one root, which hands a prepared
    gradient to every weight: ``torch.autograd.backward`` would check each tensor in Python."""

    def __call__(self) -> None:
        self._forward_backward()
        for p in self.parameters:
            p.grad = None
        self.normed.changed()

    def results(self) -> list[Of]:
        """Return the results of a second iteration, because the first one of an unchanged group
        computes the weights that all others only read."""
        self()
        self._forward_backward()
        with self.normed.scope():
            weights = self.read()
        grads = [p.grad for p in self.parameters]
        for p in self.parameters:
            p.grad = None
        return list(map(Of, weights, grads[::2], grads[1::2]))

    def _forward_backward(self) -> None:
        with self.normed.scope():
            loss = _Root.apply(self.grads, *self.read())
        loss.backward()


class _Root(torch.autograd.Function):
    """A loss with known gradients. It holds the weights until its backward, as layers do."""

    @staticmethod
    def forward(ctx: Any, grads: list[Tensor], *weights: Tensor) -> Tensor:
        ctx.grads, ctx.weights = grads, weights
        return weights[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        ctx.weights = None
        return None, *ctx.grads


def copy_of(tensors: Sequence[Tensor]) -> Callable[[], Tensor]:
    """Copy all tensors in one in-place copy. (A copy into fresh memory would measure malloc's page
    faults, which take several times as long.)"""
    first, *others = (t.detach() for t in tensors)
    source = torch.cat([t.flatten() for t in (first, *others)]) if others else first
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
