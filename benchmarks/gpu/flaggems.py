"""Case "flaggems": FlagGems' weight norm beside ours, where that package imports.

It tunes itself at the first call of every shape, with 45 variants of each kernel to compile and to
time, so it gets a process of its own, some shapes and no part in the other figures.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from ..layers import Tensors
from ..results import Result
from ..shapes import LayerCase
from . import single
from .plan import GpuJob, Part, Setting, case_title
from .raw import Raw

CASE = "flaggems"
NAME = "FlagGems"
PACKAGE = "flag_gems"

SHAPES = (((4096, 4096), 0), ((768, 48, 128), 2), ((1024, 1024, 5), 0), ((4096, 4096), 1))
"""In the order of their importance."""

PATIENCE_S = 60.0
"""For a shape."""


def jobs(setting: Setting) -> list[GpuJob]:
    """One job per shape, after all else; none if the package does not import."""
    if setting.part is not Part.REST:
        return []
    try:
        functions()
    except Exception as error:  # somebody else's package, whatever it raises
        setting.report(f"{NAME} left out: {type(error).__name__}: {error}")
        return []
    cases = [LayerCase(shape, dim, CASE, "") for shape, dim in SHAPES]
    return [
        GpuJob(f"{NAME} {case_title(c)}", lambda without, c=c: run(c, setting, without), PATIENCE_S)
        for c in cases
    ]


def run(case: LayerCase, setting: Setting, without: Collection[str]) -> Iterator[list[Result]]:
    """One weight, by everyone.

    Raises:
        ContenderError: a contender fails.
    """
    return single.run(case, torch.float32, setting, without, {NAME: make}, CASE)


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
