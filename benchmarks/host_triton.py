"""``python -m benchmarks.host_triton``: what the Triton backend costs the thread that calls it.

A model of small layers is computed with every kernel launch left out. What remains is the work of
the host: checks, tables, allocations, autograd. That needs no GPU: without one, tensors lie on the
CPU, and Triton's interpreter is there for the results to be verified before launches are left out.

A figure is the least of many turns, for the machine may have other work. "nothing" is an autograd
node with the same inputs and results that only allocates: what it takes is torch's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Annotated, Any
from unittest import mock

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import wnkernel
from wnkernel import functional as F
from wnkernel.backends import BACKENDS
from wnkernel.backends.triton import tables, variants

from .environment import Environment, environment
from .grouped import Checker, Iteration, Normed, random_grads, weights_model
from .results import FUSED, OURS, TORCH
from .shapes import LayerCase
from .timing import Contender, least

SHAPES = ((32, 16, 3), (32, 16, 5), (32, 16, 7))
NOTHING = "nothing"
HIT, MISS = f"{FUSED}, tables found", f"{FUSED}, tables made"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Found(tables.Kept):
    """Finds the table of a list wherever its arrays are."""

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        hash(key)
        return super().get(key[:2], make)


class Made(tables.Kept):
    """Finds nothing."""

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        super().get(key, object)
        return make()


class Nothing(torch.autograd.Function):
    """Results and gradients of the right shapes."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.tensors = tensors
        return tuple(map(torch.empty_like, tensors[: len(tensors) // 2]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.tensors))


def of_nothing(model: Normed) -> Normed:
    """A model whose weights nobody computes."""
    layers = [replace(layer, module=SimpleNamespace(weight=None)) for layer in model.layers]
    tensors = [layer.v for layer in layers] + [layer.g for layer in layers]

    @contextmanager
    def scope() -> Iterator[None]:
        for layer, w in zip(layers, Nothing.apply(*tensors), strict=True):
            layer.module.weight = w
        yield
        for layer in layers:
            layer.module.weight = None

    return replace(model, layers=layers, scope=scope)


def reading(model: Normed) -> Contender:
    """Reads all weights in one scope."""

    def read() -> None:
        with model.scope():
            for layer in model.layers:
                _ = layer.module.weight

    return read


def steps(count: int, where: Environment) -> dict[str, dict[str, Contender]]:
    """Verified contenders by phase: forwards, and with backwards."""
    cases = [LayerCase(SHAPES[k % len(SHAPES)], 0, "", "Conv1d") for k in range(count)]
    models = {who: weights_model(who, cases, where.device) for who in (TORCH, OURS, FUSED)}
    grads = random_grads([layer.v for layer in models[TORCH].layers])
    checker = Checker(f"{count} layers", replace(where, backend="triton"))
    for who, model in models.items():
        checker.check_iteration(who, Iteration(model, grads))
    fused = models.pop(FUSED)
    models |= {HIT: fused, MISS: fused, NOTHING: of_nothing(fused)}
    return {
        "forward": {who: reading(model) for who, model in models.items()},
        "forward+backward": {who: Iteration(model, grads) for who, model in models.items()},
    }


def calls(device: torch.device) -> dict[str, dict[str, Contender]]:
    """Calls of the function for one weight."""
    v, g = torch.randn(32, 16, 3, device=device), torch.ones(32, 1, 1, device=device)
    grad_w = torch.randn_like(v)
    v, g = v.requires_grad_(), g.requires_grad_()

    def both(norm: Callable[[], Tensor]) -> Contender:
        def call() -> None:
            norm().backward(grad_w)
            v.grad = g.grad = None

        return call

    norms = {
        OURS: lambda: F.weight_norm(v, g),
        TORCH: lambda: torch._weight_norm(v, g),
        NOTHING: lambda: Nothing.apply(v, g)[0],
    }
    return {
        "forward": norms,
        "forward+backward": {who: both(norm) for who, norm in norms.items()},
    }


def leave_out(*launch: object) -> None:
    """In place of a launch."""


@contextmanager
def without_launches(who: str) -> Iterator[None]:
    """Everything up to a launch, and none."""
    launcher = BACKENDS["triton"]._launcher
    kept = Made() if who == MISS else Found()
    with (
        mock.patch.object(variants.Variant, "launch", leave_out),
        mock.patch.object(launcher, "_tables", kept),
        wnkernel.use_backend("triton"),
    ):
        yield


def show(console: Console, title: str, found: Mapping[str, Mapping[str, float]], per: int) -> None:
    """Print microseconds by phase and contender."""
    table = Table("us", *found, title=title)
    for who in next(iter(found.values())):
        table.add_row(who, *(f"{1e6 * phase[who] / per:.2f}" for phase in found.values()))
    console.print(table)


def main(
    layers: Annotated[int, typer.Option(min=2, help="Of the model.")] = 78,
    seconds: Annotated[float, typer.Option(help="For each of four measurements.")] = 5.0,
    device: Annotated[str, typer.Option(help="A torch device.")] = DEVICE,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of torch.")] = 1,
) -> None:
    """Host time of the Triton backend: verify, leave the launches out, time."""
    console = Console()
    where = environment(device, threads)
    with wnkernel.use_backend("triton"), np.errstate(all="ignore"):
        of_steps, of_calls = steps(layers, where), calls(where.device)
    for title, phases, times, per in (
        (f"{layers} small layers, for each", of_steps, 1, layers),
        ("one call for a small weight", of_calls, 50, 1),
    ):
        found = {
            phase: least(who, times, seconds, without_launches) for phase, who in phases.items()
        }
        show(console, title, found, per)
    console.print(f"{where.device_name}, torch {where.torch}, triton {where.triton}; torch's own")
    console.print("figures have its kernels on a CPU, and its launches on a GPU, in them.")


if __name__ == "__main__":
    typer.run(main)
