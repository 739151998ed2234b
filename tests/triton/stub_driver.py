"""Runs in a process of its own: Triton's just-in-time path with a driver that launches nothing.

Everything happens as on a GPU up to the launch itself: arguments are bound and specialised, kernels
compiled for the GPU that is named, "cuda" for sm_90 or "hip" for gfx942, and loaded. Prints what
was compiled and launched as JSON, and what hooks were told.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from wnkernel.backends import BACKENDS
from wnkernel.backends.triton import variants
from wnkernel.problem import check

loaded: list[str] = []
launched: list[tuple[int, list[int | str]]] = []
bound: list[str] = []
"""Kernels whose arguments went through Triton's binder."""
told: list[tuple[str, dict[str, Any]]] = []
"""What hooks heard of launches, and when."""
described: list[bool] = []
"""Of each launch, whether there was something to tell hooks."""

TARGETS = {"cuda": GPUTarget("cuda", 90, 32), "hip": GPUTarget("hip", "gfx942", 64)}


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
        metadata, *hooks = args[3:6]
        described.append(metadata is not None)
        for hook in hooks:
            if hook is not None:
                hook(metadata)
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
        return TARGETS[sys.argv[1]]

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def listening() -> Iterator[None]:
    """Somebody listens to launches, as profilers do."""

    def enter(metadata: Any) -> None:
        told.append(("before", metadata.get()))

    def leave(metadata: Any) -> None:
        told.append(("after", metadata.get()))

    runtime = knobs.runtime
    before = runtime.launch_enter_hook, runtime.launch_exit_hook
    if before[0] is None:  # Triton 3.4 has no chains
        runtime.launch_enter_hook, runtime.launch_exit_hook = enter, leave
        yield
        runtime.launch_enter_hook, runtime.launch_exit_hook = before
        return
    for chain, hook in zip(before, (enter, leave), strict=True):
        chain.add(hook)
    yield
    for chain, hook in zip(before, (enter, leave), strict=True):
        chain.remove(hook)


def run(*shapes: tuple[int, ...], hooks: bool = False) -> dict[str, list]:
    """Forward and backward of weights normed along dim 0: kernels loaded and bound, programs and
    arguments of each launch, what hooks heard."""
    noted = {
        "loaded": loaded, "launched": launched, "bound": bound,
        "told": told, "described": described,
    }  # fmt: skip
    for each in noted.values():
        each.clear()
    problems = [check(torch.ones(s), torch.ones(s[0], *[1] * (len(s) - 1)), 0) for s in shapes]
    backend = BACKENDS["triton"]
    yes = [True] * len(problems)
    with listening() if hooks else nullcontext():
        w, norms = backend.weights(problems)
        backend.gradients(problems, norms, w, yes, yes)
    return {what: list(each) for what, each in noted.items()}


if __name__ == "__main__":
    driver.set_active(Driver())
    for kernel in (*variants.OF_ONE.values(), *variants.OF_LIST.values()):
        kernel.__class__ = Bound
    steps = {
        "one": run((64, 32, 3), hooks=True),
        "one again": run((64, 32, 3)),
        "one with hooks": run((64, 32, 3), hooks=True),
        "one of the same tile": run((1, 80)),  # a size of 1, and one that 16 divides
        "list": run((64, 32, 3), (8, 40), (1, 512)),
        "list again": run((64, 32, 3), (8, 40), (1, 512)),
        "another list": run((16, 4096), (3, 7), (5, 5), (1, 16)),
    }
    counted = variants.launched()
    compiled = sum(len(s["loaded"]) for s in steps.values())
    print(json.dumps({"steps": steps, "variants": counted, "compiled": compiled}))
    assert variants.warps(torch.device("cpu")) * Driver().get_current_target().warp_size == 256
