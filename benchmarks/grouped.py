"""The contenders of the cases about whole models: torch's layers, ours, and ours in a group.

A model is here a list of weights, or a module with the layers that have them. An iteration is what
a training step does about weight norms and nothing else: read every weight, and let one backward
take the gradients of all v and g.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import wnkernel

from . import kinds, verify
from .environment import Environment
from .kinds import NormedLayer
from .results import COMPILED, FUSED, LEGACY, OURS, TORCH, UNCHANGED, VERSION
from .shapes import LayerCase


@dataclass(frozen=True)
class Grouping:
    """How a contender computes the weights of a model."""

    kind: str
    """What its layers are."""
    reuse: str | None = None
    """None: every weight on its own."""
    changing: bool = True
    """Whether parameters count as changed after every iteration."""
    compiled: bool = False
    """Whether torch.compile makes one graph of all reads."""


GROUPINGS = {
    TORCH: Grouping(TORCH),
    OURS: Grouping(OURS),
    FUSED: Grouping(OURS, "forward"),
    VERSION: Grouping(OURS, "version"),
    UNCHANGED: Grouping(OURS, "version", changing=False),
    LEGACY: Grouping(LEGACY),
    TORCH + COMPILED: Grouping(TORCH, compiled=True),
    OURS + COMPILED: Grouping(OURS, compiled=True),
    FUSED + COMPILED: Grouping(OURS, "forward", compiled=True),
}


@dataclass(frozen=True)
class Normed:
    """A model with weight norms, computed as one contender does it."""

    model: nn.Module
    """A group lives as long as its model."""
    layers: list[NormedLayer]
    scope: Callable[[], AbstractContextManager[None]]
    """What a forward is."""
    changed: Callable[[], None]
    """What stands for an optimizer that wrote to the parameters."""
    compiled: bool
    """See :class:`Grouping`."""


def norm(who: str, model: nn.Module, convs: Sequence[tuple[nn.Module, int | None]]) -> Normed:
    """Put the weight norm of a contender on some layers of a model, each with its dim.

    Their g are moved off the norms of v, by the same random factors for everyone.
    """
    grouping = GROUPINGS[who]
    layers = [kinds.apply(grouping.kind, module, dim) for module, dim in convs]
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in layers:
            layer.g.mul_((0.8 + 0.4 * torch.rand(layer.g.shape, generator=random)).to(layer.g))
    if grouping.reuse is None:
        return Normed(model, layers, nullcontext, _nothing, grouping.compiled)
    group = wnkernel.fuse(model, reuse=grouping.reuse)
    # without an optimizer, a refresh is the one change that this mode has to be told about
    tell = grouping.changing and grouping.reuse == "version"
    changed = group.refresh if tell else _nothing
    return Normed(model, layers, group.scope, changed, grouping.compiled)


def _nothing() -> None:
    pass


class Weight(nn.Module):
    """A layer that has nothing but its weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def weights_model(who: str, cases: Sequence[LayerCase], device: torch.device) -> Normed:
    """A model of bare weights, the same for every contender."""
    random = torch.Generator().manual_seed(0)
    bare = [Weight(torch.randn(c.shape, generator=random).to(device)) for c in cases]
    convs = [(module, c.dim) for module, c in zip(bare, cases, strict=True)]
    return norm(who, nn.ModuleList(bare), convs)


def random_grads(weights: Sequence[Tensor]) -> list[Tensor]:
    """A gradient for each of some weights."""
    random = torch.Generator().manual_seed(2)
    return [torch.randn(w.shape, generator=random).to(w.device) for w in weights]


class Iteration:
    """Reads all weights in one scope, takes all gradients in one backward, drops them.

    The backward has one root, which hands a prepared gradient to every weight: the checks that
    ``torch.autograd.backward`` makes in Python for each of its tensors are no part of training.
    """

    def __init__(self, model: Normed, grads: list[Tensor]) -> None:
        self.model = model
        self.grads = grads
        self._read = _reader(model)
        self._parameters = [p for layer in model.layers for p in (layer.v, layer.g)]

    def __call__(self) -> None:
        self._forward_backward()
        for p in self._parameters:
            p.grad = None
        self.model.changed()

    def results(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """``(w, grad_v, grad_g)`` of every layer, of one more iteration."""
        self._forward_backward()
        with self.model.scope():
            weights = self._read()
        out = [
            (w, layer.v.grad, layer.g.grad)
            for w, layer in zip(weights, self.model.layers, strict=True)
        ]
        for p in self._parameters:
            p.grad = None
        return out

    def _forward_backward(self) -> None:
        with self.model.scope():
            loss = _Root.apply(self.grads, *self._read())
        loss.backward()


def _reader(model: Normed) -> Callable[[], list[Tensor]]:
    """What reads all weights. Compiled, it is one graph, which guards what a model's would."""
    if not model.compiled:
        return lambda: [layer.weight() for layer in model.layers]
    modules = [layer.module for layer in model.layers]
    return torch.compile(lambda: [m.weight for m in modules], fullgraph=True, dynamic=False)


class _Root(torch.autograd.Function):
    """A loss whose gradients are known. It holds the weights until its backward, as layers do."""

    @staticmethod
    def forward(ctx: Any, grads: list[Tensor], *weights: Tensor) -> Tensor:
        ctx.grads, ctx.weights = grads, weights
        return weights[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        ctx.weights = None
        return None, *ctx.grads


class Checker:
    """Checks the weights and gradients of one contender after the other against float64.

    Of ours it keeps the last that passed: whoever has the same bits need not be computed again.
    """

    def __init__(self, title: str, where: Environment) -> None:
        self._title = title
        self._own_kernels = where.own_kernels
        self._passed: tuple[list[Tensor], float] | None = None

    def check(
        self,
        who: str,
        layers: Sequence[NormedLayer],
        results: Sequence[tuple[Tensor, Tensor, Tensor]],
        grads: Sequence[Tensor],
    ) -> float:
        """The worst error of ``(w, grad_v, grad_g)`` of all layers.

        Raises:
            VerificationError: outside the tolerance, or weights that should be computed together
                are not.
        """
        grouping = GROUPINGS[who]
        nodes = {w.grad_fn for w, _, _ in results}
        if len(nodes) != (1 if grouping.reuse or grouping.compiled else len(results)):
            raise verify.VerificationError(
                f"{who}, {self._title}: {len(results)} weights have {len(nodes)} autograd nodes"
            )
        bits = [t.detach() for result in results for t in result]
        ours = grouping.kind == OURS
        if ours and self._passed and all(map(torch.equal, bits, self._passed[0])):
            return self._passed[1]
        long_sums = not ours or not self._own_kernels
        worst = 0.0
        for i, (layer, got, grad_w) in enumerate(zip(layers, results, grads, strict=True)):
            want = verify.reference(layer.v, layer.g, layer.dim, grad_w)
            about = f"{who}, {self._title}, weight {i} of shape {list(layer.v.shape)}"
            worst = max(worst, verify.check(about, got, want, long_sums=long_sums))
        if ours:
            self._passed = bits, worst
        return worst

    def check_iteration(self, who: str, iteration: Iteration) -> float:
        """Check what a second iteration gives: the first of an unchanged group computes what the
        others only read.

        Raises:
            VerificationError: outside the tolerance, or the prepared gradients were written to.
        """
        grads = [g.clone() for g in iteration.grads]
        iteration()
        results = iteration.results()
        if not all(map(torch.equal, grads, iteration.grads)):
            raise verify.VerificationError(f"{who}, {self._title}: the backward wrote to its input")
        return self.check(who, iteration.model.layers, results, grads)
