"""The grid of single layers: the distinct weights of real models, and some dims that they lack."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SHAPES_CSV = Path(__file__).with_name("shapes.csv")

ADDED = "added"
"""The label of the cases below, which no listed model has."""

_ADDED_SHAPES = ((512, 256, 16), (768, 48, 128), (1024, 64, 128), (512, 512, 3), (626, 768))


@dataclass(frozen=True)
class LayerCase:
    """One weight of the grid. ``dim`` None is one norm over the whole tensor."""

    shape: tuple[int, ...]
    dim: int | None
    label: str
    layer: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def kind(self) -> str:
        """Which of the four memory patterns this is; the summary groups by it."""
        return dim_kind(self.dim, len(self.shape))

    @property
    def norm_shape(self) -> tuple[int, ...]:
        """The shape of g."""
        if self.dim is None:
            return ()
        return tuple(n if k == self.dim else 1 for k, n in enumerate(self.shape))

    @property
    def row_length(self) -> int:
        """How many elements each norm sums."""
        return self.numel if self.dim is None else self.numel // self.shape[self.dim]


def dim_kind(dim: int | None, ndim: int) -> str:
    """``first``, ``last``, ``middle`` or ``whole``."""
    if dim is None:
        return "whole"
    if dim == 0:
        return "first"
    return "last" if dim == ndim - 1 else "middle"


def shape_text(shape: Iterable[int]) -> str:
    """(512, 256, 16) as ``512x256x16``, the spelling of shapes.csv."""
    return "x".join(map(str, shape))


def grid() -> list[LayerCase]:
    """Every distinct (shape, dim): first those of shapes.csv, then the added ones.

    Nearly all weights of real models are normed along dim 0, so the other memory patterns are
    added on some of the same shapes, labelled as such.
    """
    users: dict[tuple[tuple[int, ...], int | None], list[str]] = {}
    layers: dict[tuple[tuple[int, ...], int | None], str] = {}
    for row in _rows():
        key = _shape(row), _dim(row)
        users.setdefault(key, []).append(row["model"])
        layers.setdefault(key, row["layer"])
    for shape in _ADDED_SHAPES:
        for dim in (*range(len(shape)), None):
            if (shape, dim) not in users:
                users[shape, dim] = [ADDED]
                layers[shape, dim] = "Linear" if len(shape) == 2 else "Conv1d"
    return [
        LayerCase(shape, dim, _label(models), layers[shape, dim])
        for (shape, dim), models in users.items()
    ]


def weight_list(model: str) -> list[LayerCase]:
    """Every weight of a model of shapes.csv, equal ones as often as it has them.

    Equal shapes are spread over the list, for in a model they do not stand side by side either.
    """
    placed = [
        ((k + 0.5) / int(row["count"]), LayerCase(_shape(row), _dim(row), model, row["layer"]))
        for row in _rows()
        if row["model"] == model
        for k in range(int(row["count"]))
    ]
    return [case for _, case in sorted(placed, key=lambda entry: entry[0])]


def _rows() -> list[dict[str, str]]:
    with SHAPES_CSV.open(newline="") as file:
        return list(csv.DictReader(file))


def _shape(row: dict[str, str]) -> tuple[int, ...]:
    return tuple(int(n) for n in row["shape"].split("x"))


def _dim(row: dict[str, str]) -> int | None:
    return None if row["dim"] == "none" else int(row["dim"])


def _label(models: list[str]) -> str:
    distinct = list(dict.fromkeys(models))
    return distinct[0] + (f" +{len(distinct) - 1}" if len(distinct) > 1 else "")
