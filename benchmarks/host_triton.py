"""``python -m benchmarks.host_triton``: the cost of the Triton backend for the calling thread.

A model of small layers runs with every kernel launch left out. The rest is the work of the host:
checks, tables, allocations, autograd. This needs no GPU. Without one, tensors are on the CPU, and
Triton's interpreter verifies the results before launches are left out. With ``--launches``, only
launches are measured: kernels are compiled for sm_90, and a driver takes them that does nothing.

A figure is the minimum of many turns, because the machine may do other work. "nothing" is an
autograd node with the same inputs and results that only allocates: torch itself takes its time.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Annotated, Any
from unittest import mock

import numpy as np
import torch
import typer
from torch import Tensor

# Triton reads this variable when it is imported.
if "--launches" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "0"
elif not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton
from triton.backends.compiler import GPUTarget

import wnkernel
from wnkernel import functional as F
from wnkernel.backends import BACKENDS
from wnkernel.backends.triton import tables, variants
from wnkernel.backends.triton.plan import tiles
from wnkernel.backends.triton.tables import FORWARD
from wnkernel.backends.triton.variants import Types

from .contenders import FUSED, OURS, TORCH, Iteration, Normed, random_grads, weights_model
from .environment import Environment, environment
from .report import console, show
from .shapes import LayerCase
from .timing import Contender, least
from .verify import Checker

KERNELS = (3, 5, 7)
NOTHING = "nothing"
HIT, MISS = f"{FUSED}, tables found", f"{FUSED}, tables made"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAUNCHES = 1000  # Per sample.
Phases = Mapping[str, Mapping[str, Contender]]  # The contenders of each phase.


class Found(tables.Kept):
    """Finds the table of a list at any addresses of its arrays."""

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        hash(key)
        return super().get(key[:2], make)


class Made(tables.Kept):
    """Finds nothing."""

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        super().get(key, object)
        return make()


class Nothing(torch.autograd.Function):
    """An autograd function that only makes results and gradients of the right shapes."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.tensors = tensors
        return tuple(map(torch.empty_like, tensors[: len(tensors) // 2]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.tensors))


def of_nothing(normed: Normed) -> Normed:
    """Return a model whose weights are not computed."""
    modules = [SimpleNamespace(weight=None) for _ in normed.layers]
    pairs = zip(normed.layers, modules, strict=True)
    layers = [replace(layer, module=m, weight=lambda m=m: m.weight) for layer, m in pairs]
    tensors = [layer.v for layer in layers] + [layer.g for layer in layers]

    @contextmanager
    def scope() -> Iterator[None]:
        for module, w in zip(modules, Nothing.apply(*tensors), strict=True):
            module.weight = w
        yield
        for module in modules:
            module.weight = None

    return replace(normed, modules=modules, layers=layers, scope=scope)


def read(normed: Normed) -> None:
    """Read all weights in one scope."""
    with normed.scope():
        for module in normed.modules:
            _ = module.weight


def steps(count: int, where: Environment) -> Phases:
    """Return verified models: forwards, and forwards with backwards."""
    cases = [LayerCase((32, 16, KERNELS[k % 3]), 0, "", "Conv1d") for k in range(count)]
    models = {who: weights_model(who, cases, where.device) for who in (TORCH, OURS, FUSED)}
    grads = random_grads([layer.v for layer in models[TORCH].layers])
    checker = Checker(f"{count} layers", replace(where, backend="triton"))
    for who, normed in models.items():
        checker.check_pass(who, Iteration(normed, grads))
    fused = models.pop(FUSED)
    models |= {HIT: fused, MISS: fused, NOTHING: of_nothing(fused)}
    return {
        "forward": {who: functools.partial(read, normed) for who, normed in models.items()},
        "forward+backward": {who: Iteration(normed, grads) for who, normed in models.items()},
    }


def calls(device: torch.device) -> Phases:
    """Return calls of the function for one weight."""
    v, g = torch.randn(32, 16, 3, device=device), torch.ones(32, 1, 1, device=device)
    grad_w = torch.randn_like(v)
    v, g = v.requires_grad_(), g.requires_grad_()

    def both(norm: Callable[[], Tensor]) -> None:
        norm().backward(grad_w)
        v.grad = g.grad = None

    norms = {
        OURS: lambda: F.weight_norm(v, g),
        TORCH: lambda: torch._weight_norm(v, g),
        NOTHING: lambda: Nothing.apply(v, g)[0],
    }
    return {
        "forward": norms,
        "forward+backward": {who: lambda n=norm: both(n) for who, norm in norms.items()},
    }


def leave_out(*launch: object) -> None:
    """Replaces a launch."""


@contextmanager
def without_launches(who: str) -> Iterator[None]:
    """Run everything up to a launch, but no launch."""
    kept = Made() if who == MISS else Found()
    with (
        mock.patch.object(variants.Variant, "launch", leave_out),
        mock.patch.object(BACKENDS["triton"]._launcher, "_tables", kept),
        wnkernel.use_backend("triton"),
    ):
        yield


DRIVER = SimpleNamespace(
    utils=SimpleNamespace(
        # These are module, function, registers, spills and the most threads.
        load_binary=lambda *args: (1, 2, 32, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 232448, "warpSize": 32},
    ),
    launcher_cls=lambda source, metadata: leave_out,
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 0,
)
"""Stands for one GPU, whose launches do nothing."""


def ways() -> dict[str, Contender]:
    """Return contenders that launch the forward of one weight, and of a list."""
    t, device = Types(*[torch.float32] * 3), torch.device("cpu")
    cases = {
        "a weight": (variants.of_one(FORWARD, t, tiles(4)[0], 0, device), (1,) * 16),
        "a list": (variants.of_list(FORWARD, t, True, 0, device), (1,) * 3),
    }
    found: dict[str, Contender] = {}
    for what, (variant, args) in cases.items():
        variant.launch(1, args)
        every = (*args, *variant.choices.values())
        found |= {
            f"{what}, ours": lambda v=variant, a=args: v.launch(1, a),
            f"{what}, compiled(grid)": lambda c=variant._compiled, a=every: c[1, 1, 1](*a),
            f"{what}, kernel(grid)": lambda v=variant, a=args: v.kernel[(1,)](
                *a, **v.choices, num_warps=8
            ),
        }
    return found


def main(
    layers: Annotated[int, typer.Option(min=2, help="Of the model.")] = 78,
    seconds: Annotated[float, typer.Option(help="For each measurement.")] = 5.0,
    launches: Annotated[bool, typer.Option("--launches", help="Launches, and no GPU.")] = False,
) -> None:
    """Host time of the Triton backend, in microseconds: verify, leave the launches out, time."""
    where = environment("cpu" if launches else DEVICE, 1)
    work: list[tuple[str, Phases, int, int]] = []
    if launches:
        triton.runtime.driver.set_active(DRIVER)
        title = "host time of a launch, without the driver's"
        work.append((title, {"launch": ways()}, LAUNCHES, 1))
    else:
        with wnkernel.use_backend("triton"), np.errstate(all="ignore"):
            of_steps = steps(layers, where)
            work.append((f"{layers} small layers, for each", of_steps, 1, layers))
            work.append(("one call for a small weight", calls(where.device), 50, 1))
    more = {} if launches else {"during": without_launches}
    for title, phases, times, per in work:
        best = [least(who, times, seconds, **more) for who in phases.values()]
        rows = [(who, *(f"{1e6 * of[who] / per:.2f}" for of in best)) for who in best[0]]
        show(console(), title, ("us", *phases), rows)
    print(f"{where.device_name}, torch {where.torch}, triton {where.triton}; torch's own figures")
    print("have its kernels on a CPU, and its launches on a GPU, in them.")


if __name__ == "__main__":
    typer.run(main)
