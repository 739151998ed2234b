"""Runs in a process of its own: Triton's just-in-time path with a driver that launches nothing.

Everything happens as on a GPU up to the launch itself: arguments are bound and specialised, kernels
compiled for sm_90 and loaded. Prints what was compiled and launched as JSON.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from wnkernel.backends import BACKENDS
from wnkernel.backends.triton import launch
from wnkernel.problem import check

loaded: list[str] = []
launched: list[tuple[int, list[int | str]]] = []
bound: list[str] = []
"""Kernels whose arguments went through Triton's binder."""


class Bound(JITFunction):
    """Notes the calls that take Triton's own way."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        bound.append(self.fn.__name__)
        return super().run(*args, **kwargs)


class Launcher:
    """What Triton generates to launch a kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, programs: int, y: int, z: int, *args: Any) -> None:
        """Of ``args``, the first are stream, function, two metadata and two hooks."""
        launched.append((programs, [a if type(a) is int else str(a) for a in args[6:]]))


def load_binary(name: str, *args: Any) -> tuple[int, ...]:
    loaded.append(name)
    return 1, 2, 32, 0, 1024  # module, function, registers, spills, threads at most


class Driver:
    """One GPU that is not there."""

    launcher_cls = Launcher
    utils = SimpleNamespace(
        load_binary=load_binary,
        get_device_properties=lambda device: {"max_shared_mem": 232448, "warpSize": 32},
    )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def run(*shapes: tuple[int, ...]) -> dict[str, list]:
    """Forward and backward of weights normed along dim 0: kernels loaded and bound, programs and
    arguments of each launch."""
    for noted in (loaded, launched, bound):
        noted.clear()
    problems = [check(torch.ones(s), torch.ones(s[0], *[1] * (len(s) - 1)), 0) for s in shapes]
    backend = BACKENDS["triton"]
    w, norms = backend.forward(problems)
    yes = [True] * len(problems)
    backend.backward(problems, norms, w, yes, yes)
    return {"loaded": list(loaded), "launched": list(launched), "bound": list(bound)}


if __name__ == "__main__":
    driver.set_active(Driver())
    for direction in (launch.FORWARD, launch.BACKWARD):
        direction.one.__class__ = direction.many.__class__ = Bound
    steps = {
        "one": run((64, 32, 3)),
        "one again": run((64, 32, 3)),
        "one of the same tile": run((1, 80)),  # a size of 1, and one that 16 divides
        "list": run((64, 32, 3), (8, 40), (1, 512)),
        "list again": run((64, 32, 3), (8, 40), (1, 512)),
        "another list": run((16, 4096), (3, 7), (5, 5), (1, 16)),
    }
    variants = len(BACKENDS["triton"]._launcher.variants)
    compiled = sum(len(s["loaded"]) for s in steps.values())
    print(json.dumps({"steps": steps, "variants": variants, "compiled": compiled}))
    assert launch.warps(torch.device("cpu")) == 8
