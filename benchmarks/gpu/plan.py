"""The size of the GPU benchmark: a real run, and a tiny one that tries the program."""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..environment import Environment
from ..fused import MODELS
from ..results import Result
from ..shapes import LayerCase, grid, weight_list

LARGE_BYTES = 64e6  # From this size on, an aim is a share of the card's copy bandwidth.

_ADDED = {
    "large": {
        (4096, 4096): (0, 1, None),
        (8192, 4096): (0, 1, None),
        (65536, 256): (0, 1, None),
        (65536, 512): (0, 1, None),
        (16384, 2048): (0,),
        (4096, 16384): (0,),  # rows longer than a block keeps, in float32
        (2048, 2048, 5): (0, 1, 2, None),
        (4096, 2048, 5): (0, 1, None),
    },
    "odd dims": {(512, 512, 3): (1, None), (512, 256, 16): (1, None), (1024, 1024, 5): (1, None)},
}
"""Cases that no listed model has, by their labels."""

KEY = (((768, 48, 128), 2), ((1024, 64, 128), 2))  # Of wav2vec 2.0. Here torch launches 8 blocks.
# These are measured first: every way of cutting a weight, with weights that fit into a cache and
# weights that do not.
FIRST = (
    *KEY,
    *(((4096, 4096), dim) for dim in (0, 1, None)),
    ((65536, 256), 0),
    *(((2048, 2048, 5), dim) for dim in (0, 2)),
)
FIRST_MODELS = ("HiFi-GAN-V1", "DAC")

Report = Callable[[str], None]  # Takes one line.


class Part(str, enum.Enum):
    """A part of the cases: the first ones, or all others."""

    KEY = "key"
    REST = "rest"


@dataclass(frozen=True)
class GpuPlan:
    """The size of a run. Important cases come first, because time may run out."""

    copy_bytes: tuple[int, ...]
    weights: Mapping[Part, Sequence[LayerCase]]
    models: Mapping[Part, Mapping[str, Sequence[LayerCase]]]  # All weights of a model, by its name.
    weight_budget_s: Mapping[Part, float]  # For the rounds of one phase of one weight.
    host_every: int = 4  # Take every n-th of the small weights.
    graph_s: float = 1e-3  # How long the work in one CUDA graph should take.
    sample_s: float = 2e-3  # The shortest turn.
    host_budget_s: float = 0.0
    model_budget_s: float = 0.0


def _weights() -> dict[Part, tuple[LayerCase, ...]]:
    """Return each case once: the first ones, large ones, scarce dims, then the grid from the
    largest down."""
    from_large = sorted(grid(), key=lambda c: (c.kind == "first", -c.numel))
    every = {
        (shape, dim): LayerCase(shape, dim, label, "")
        for label, group in _ADDED.items()
        for shape, dims in group.items()
        for dim in dims
    }
    every |= {(c.shape, c.dim): c for c in from_large}
    first = tuple(every.pop(key) for key in FIRST)
    return {Part.KEY: first, Part.REST: tuple(every.values())}


_TINY = tuple(
    LayerCase(shape, dim, "tiny", "")
    for shape, dim in (((96, 8, 16), 2), ((64, 256), 0), ((16, 24, 3), 1), ((32, 33), None))
)

REAL = GpuPlan(
    copy_bytes=(2**30, 2**31, 2**32),
    weights=_weights(),
    models={
        Part.KEY: {name: weight_list(name) for name in FIRST_MODELS},
        Part.REST: {name: weight_list(name) for name in MODELS if name not in FIRST_MODELS},
    },
    weight_budget_s={Part.KEY: 0.2, Part.REST: 0.05},
    host_budget_s=0.1,
    model_budget_s=0.6,
)

TINY = GpuPlan(
    copy_bytes=(2**20,),
    weights={Part.KEY: _TINY[:1], Part.REST: _TINY[1:]},
    models={Part.KEY: {"tiny": _TINY}, Part.REST: {}},
    weight_budget_s=dict.fromkeys(Part, 0.0),
    host_every=40,
    graph_s=1e-4,
    sample_s=1e-4,
)


class Setting(NamedTuple):
    """The settings that all cases of a run share."""

    plan: GpuPlan
    part: Part
    where: Environment  # Its backend is the one of ours that is measured.
    report: Report
    fail: Report  # Reports a failure of ours after which the run continues.


class GpuJob(NamedTuple):
    """One case."""

    title: str
    run: Callable[[Collection[str]], Iterable[list[Result]]]
    """Takes the names of contenders to leave out, and yields the rows of one phase after the other.
    Raises ContenderError if a contender fails."""
    patience_s: float = 20.0  # Its longest time. Most cases take less than a second.
