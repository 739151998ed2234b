"""Case "models": whole models, each weight computed on its own, as the three kinds do it."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from . import kinds, verify
from .environment import Environment
from .kinds import NormedLayer
from .model_zoo import BY_NAME, ZOO, build, model_input
from .plan import Job, Plan
from .results import COPY, OURS, TORCH, Result, Subject, rows
from .timing import Contender, device_sampler, measure

Forward = Callable[[Tensor], Tensor]
"""Of a whole model."""

ALONE = "weight norms alone"
STEP = "training step"

OUTPUT_L2 = 1e-4
"""Allowed relative difference of two outputs: float32 roundings through some tens of layers."""

LEARNING_RATE = 1e-6
"""So small that the models stay the same while they are timed."""


def jobs(plan: Plan, where: Environment) -> list[Job]:
    """One job per model."""
    names = plan.models or tuple(entry.model for entry in ZOO)
    return [Job(f"model {name}", lambda n=name: freed(run(n, plan, where))) for name in names]


def freed(results: list[Result]) -> list[Result]:
    """Pass results on after the models that gave them are gone: modules sit in cycles, and what
    they hold would move the measurements that follow."""
    gc.collect()
    return results


def run(name: str, plan: Plan, where: Environment) -> list[Result]:
    """Verify, then time, the weight norms alone and a training step, all kinds interleaved."""
    original = kinds.strip(build(name, where.device))
    grads = original.grads()
    models, alone = {}, {}
    for kind in kinds.APPLY:
        models[kind], layers = original.with_kind(kind)
        alone[kind] = Alone(layers, grads)
    del original
    about = alone_subject(name, "models", alone[TORCH].layers)
    errors = check_alone(name, alone, where)
    x = model_input(name, where.device)
    _check_outputs(name, models, x)
    sample = device_sampler(where.device)

    timed: dict[str, Contender] = dict(alone)
    timed[COPY] = copy_all(alone[TORCH].layers)
    stats = measure(timed, sample, plan.model_budget_s)
    out = rows(about, where, stats, errors=errors)
    del timed, alone, grads

    forward = BY_NAME[name].forward
    steps = {
        kind: training_step(model, functools.partial(forward, model), x)
        for kind, model in models.items()
    }
    stats = measure(steps, sample, plan.step_budget_s)
    return out + rows(alone_subject(name, "models", layers, phase=STEP), where, stats)


class Alone:
    """Reads every weight-normed weight of a model and takes the gradients of all v and g.

    Args:
        layers: the layers.
        grads: the gradients of their weights.
        read: how to get all weights at once; by default one after the other, as a forward does.
    """

    def __init__(
        self,
        layers: list[NormedLayer],
        grads: list[Tensor],
        read: Callable[[], list[Tensor]] | None = None,
    ) -> None:
        self.layers = layers
        self.grads = grads
        self.read = read or (lambda: [layer.weight() for layer in layers])
        self.inputs = [p for layer in layers for p in (layer.v, layer.g)]

    def __call__(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.read(), self.inputs, self.grads)

    def results(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """``(w, grad_v, grad_g)`` of every layer."""
        weights = self.read()
        grads = torch.autograd.grad(weights, self.inputs, self.grads)
        return list(zip(weights, grads[::2], grads[1::2], strict=True))


def check_alone(name: str, contenders: Mapping[str, Alone], where: Environment) -> dict[str, float]:
    """Check the weights and gradients of every layer against float64; the worst errors.

    Raises:
        VerificationError: outside the tolerance.
    """
    results = {who: alone.results() for who, alone in contenders.items()}
    first = next(iter(contenders.values()))
    errors = dict.fromkeys(contenders, 0.0)
    for i, (layer, grad_w) in enumerate(zip(first.layers, first.grads, strict=True)):
        want = verify.reference(layer.v, layer.g, layer.dim, grad_w)
        for who, all_results in results.items():
            long_sums = who != OURS or not where.own_kernels
            title = f"{who}, {name}, weight {i} of shape {list(layer.v.shape)}"
            error = verify.check(title, all_results[i], want, long_sums=long_sums)
            errors[who] = max(errors[who], error)
    return errors


def _check_outputs(name: str, models: Mapping[str, nn.Module], x: Tensor) -> None:
    forward = BY_NAME[name].forward
    with torch.no_grad():
        want = forward(models[TORCH], x)
        for kind, model in models.items():
            verify.check_same(f"{kind}, {name}", forward(model, x), want, OUTPUT_L2)


def training_step(model: nn.Module, forward: Forward, x: Tensor) -> Contender:
    """Forward, mean of squares, backward, SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

    def step() -> None:
        forward(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def copy_all(layers: list[NormedLayer]) -> Contender:
    """The yardstick: the bytes of all v in one in-place copy."""
    source = torch.cat([layer.v.detach().flatten() for layer in layers])
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def alone_subject(name: str, case: str, layers: list[NormedLayer], phase: str = ALONE) -> Subject:
    """How a model is described in the results."""
    numel = sum(layer.v.numel() for layer in layers)
    return Subject(
        case=case,
        label=name,
        phase=phase,
        dtype="float32",
        shape=f"{len(layers)} layer{'s' if len(layers) > 1 else ''}",
        dim="",
        kind="",
        numel=numel,
        array_bytes=numel * layers[0].v.element_size(),
    )
