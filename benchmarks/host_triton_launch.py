"""``python -m benchmarks.host_triton_launch``: what a launch costs the thread that calls it, up to
the driver.

``python -m benchmarks.host_triton`` leaves launches out. Here they are all there is: kernels are
compiled for sm_90 and handed to a driver that does nothing, so no GPU is needed. A figure is the
least of many samples.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

os.environ["TRITON_INTERPRET"] = "0"  # looked at when Triton is imported

import triton
from triton.backends.compiler import GPUTarget

from wnkernel.backends.triton import variants
from wnkernel.backends.triton.plan import tiles
from wnkernel.backends.triton.tables import FORWARD
from wnkernel.backends.triton.variants import Types

from .environment import environment
from .timing import Contender, least

TIMES = 1000
"""Calls in a sample."""


class Nothing:
    """What Triton generates to launch a kernel: does not."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *args: Any) -> None:
        pass


class Driver:
    """One GPU that is not there."""

    launcher_cls = Nothing
    utils = SimpleNamespace(
        # module, function, registers, spills, threads at most
        load_binary=lambda *args: (1, 2, 32, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 232448, "warpSize": 32},
    )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def ways() -> dict[str, Contender]:
    """To launch the forward of a weight alone, and of a list."""
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
    seconds: Annotated[float, typer.Option(help="For all measurements.")] = 10.0,
) -> None:
    """Host time of a launch, ours and Triton's."""
    where = environment("cpu", threads=1)
    triton.runtime.driver.set_active(Driver())
    best = least(ways(), TIMES, seconds)
    table = Table("launch of", "us", title="host time of a launch, without the driver's")
    for who, found in best.items():
        table.add_row(who, f"{1e6 * found:.2f}")
    console = Console()
    console.print(table)
    console.print(f"{where.device_name}, torch {where.torch}, triton {where.triton}")


if __name__ == "__main__":
    typer.run(main)
