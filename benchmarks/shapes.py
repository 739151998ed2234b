"""The grid of single layers: the distinct weights of real models, and some dims that these lack."""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

ADDED = "added"  # The label of the shapes below, which no listed model has.
# Models of shapes.csv without weight norm: their rows are scaled in place. The grid lacks them.
NORMALIZED = ("nGPT-12-layers", "EDM2-S")
_ADDED_SHAPES = ((512, 256, 16), (768, 48, 128), (1024, 64, 128), (512, 512, 3), (626, 768))


@dataclass(frozen=True)
class LayerCase:
    """One weight of the grid. ``dim`` None means one norm over the whole tensor."""

    shape: tuple[int, ...]
    dim: int | None
    label: str
    layer: str  # The name of a class of torch.nn; empty if no layer is built of it.

    def __str__(self) -> str:
        return f"{shape_text(self.shape)} dim {self.dim_text}"

    @property
    def dim_text(self) -> str:
        """The dim, as shapes.csv spells it."""
        return "none" if self.dim is None else str(self.dim)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def kind(self) -> str:
        """One of the four memory patterns, by which the summary groups weights."""
        if self.dim is None:
            return "whole"
        return {0: "first", len(self.shape) - 1: "last"}.get(self.dim, "middle")

    @property
    def norm_shape(self) -> tuple[int, ...]:
        """The shape of g."""
        sizes = enumerate(self.shape)
        return () if self.dim is None else tuple(n if k == self.dim else 1 for k, n in sizes)


def shape_text(shape: Iterable[int]) -> str:
    """Spell (512, 256, 16) as ``512x256x16``, like shapes.csv."""
    return "x".join(map(str, shape))


def dtype_text(dtype: torch.dtype) -> str:
    """Spell torch.float32 as ``float32``."""
    return str(dtype).removeprefix("torch.")


def grid() -> list[LayerCase]:
    """Return every distinct (shape, dim): first those of shapes.csv, then the added ones. Real
    models norm nearly all weights along dim 0, so other memory patterns are added."""
    users: dict[tuple[tuple[int, ...], int | None], list[LayerCase]] = {}
    for case in (c for c, _ in _rows() if c.label not in NORMALIZED):
        users.setdefault((case.shape, case.dim), []).append(case)
    for shape in _ADDED_SHAPES:
        for dim in (*range(len(shape)), None):
            users.setdefault((shape, dim), [LayerCase(shape, dim, ADDED, "")])
    found = []
    for case, *same in users.values():
        others = {c.label for c in same} - {case.label}
        label = f"{case.label} +{len(others)}" if others else case.label
        found.append(replace(case, label=label))
    return found


def weight_list(model: str) -> list[LayerCase]:
    """Return every weight of a model of shapes.csv, as often as the model has it. Equal shapes are
    spread over the list, because a model does not have them side by side either."""
    rows = [(case, count) for case, count in _rows() if case.label == model]
    placed = [((k + 0.5) / count, case) for case, count in rows for k in range(count)]
    return [case for _, case in sorted(placed, key=lambda entry: entry[0])]


@functools.cache
def _rows() -> list[tuple[LayerCase, int]]:
    """Return weights, and how often a model has each."""
    with Path(__file__).with_name("shapes.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    shapes = [tuple(map(int, row["shape"].split("x"))) for row in found]
    dims = [None if row["dim"] == "none" else int(row["dim"]) for row in found]
    return [
        (LayerCase(shape, dim, row["model"], row["layer"]), int(row["count"]))
        for shape, dim, row in zip(shapes, dims, found, strict=True)
    ]
