"""Case "flaggems": FlagGems' weight norm beside ours, where that package imports.

It tunes itself at the first call of every shape, with 45 variants of each kernel to compile and to
time, so it gets a process of its own, some shapes and no part in the other figures.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from ..environment import Environment
from ..layers import Tensors
from ..plan import Job
from ..shapes import LayerCase
from . import single
from .plan import GpuPlan, case_title
from .raw import Raw

CASE = "flaggems"
NAME = "FlagGems"
PACKAGE = "flag_gems"

SHAPES = (((4096, 4096), 0), ((768, 48, 128), 2), ((1024, 1024, 5), 0), ((4096, 4096), 1))
"""In the order of their importance."""

Report = Callable[[str], None]


def jobs(plan: GpuPlan, where: Environment, report: Report) -> list[Job]:
    """One job per shape; none if the package does not import."""
    try:
        functions()
    except Exception as error:  # somebody else's package, whatever it raises
        report(f"{NAME} left out: {type(error).__name__}: {error}")
        return []
    cases = [LayerCase(shape, dim, CASE, "") for shape, dim in SHAPES]
    return [
        Job(
            f"{NAME} {case_title(c)}",
            lambda c=c: single.run(
                c, torch.float32, plan, where, report, extra={NAME: make}, case_name=CASE
            ),
        )
        for c in cases
    ]


def functions() -> tuple[Callable[..., tuple[Tensor, Tensor]], ...]:
    """Its forward and backward for the first and the last dim.

    Raises:
        ImportError: it is not installed.
        AttributeError: it has not the functions of version 5.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise ImportError("not installed")
    package = importlib.import_module(PACKAGE)
    return package.weight_norm_interface, package.weight_norm_interface_backward


def make(t: Tensors, dim: int | None) -> Raw:
    """The contender, see :mod:`benchmarks.gpu.raw`."""
    forward, backward = functions()
    norm = forward(t.v, t.g, dim)[1]
    return Raw(lambda: forward(t.v, t.g, dim), lambda: backward(t.grad_w, t.v, t.g, norm, dim))
