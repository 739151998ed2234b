"""How many variants of the Triton kernels there are, counted without compiling any."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from .triton_cases import OLDEST_TRITON

pytest.importorskip("triton", minversion=OLDEST_TRITON, reason="needs Triton")

from wnkernel.backends.triton import launch
from wnkernel.backends.triton.launch_table import Kind, tiles
from wnkernel.backends.triton.tables import HEADER, Weight

DTYPES = {
    "float32": launch.Types(torch.float32, torch.float32, torch.float32),
    "bfloat16": launch.Types(torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "autocast": launch.Types(torch.float32, torch.float32, torch.bfloat16),
    "float64": launch.Types(torch.float64, torch.float64, torch.float64),
}


class Recorder(launch.Launcher):
    """Notes what would be launched."""

    def _run(self, kernel, programs, args, choices, device) -> None:
        self.variants.add((kernel, *choices.values()))


@pytest.mark.parametrize("t", DTYPES.values(), ids=DTYPES)
def test_launches_use_all_variants_that_are_stated_and_no_others(t):
    known = tiles(t.v.itemsize)
    possible: set[tuple[object, ...]] = set()
    for direction in (launch.FORWARD, launch.BACKWARD):
        for rows_only, finish in ((True, 0), (False, 0), (False, 1)):
            choices = launch.choices_of_list(t, rows_only, finish)
            possible.add((direction.many, *choices.values()))
        for tile in known:
            for finish in (0,) if tile.kind is Kind.ROWS else (0, 1):
                choices = launch.choices_of_one(t, tile, finish)
                possible.add((direction.one, *choices.values()))
    # The number that info() shows is that of float32 and half types; float64 has fewer tiles.
    assert len(possible) <= launch.most_variants()
    assert len(possible) == launch.most_variants() or t.v is torch.float64

    sizes = {1, 3, 1 << 18} | {tile.columns for tile in known}
    weights = [
        Weight(outer, rows, inner, vector, 0.0)
        for outer, rows, inner, vector in product(sizes, sizes, sizes, (1, t.vector))
        if outer * rows * inner <= 1 << 20
    ]
    recorder = Recorder()

    def launched(direction: launch.Direction, weights: list[Weight]) -> None:
        arrays = len(direction.columns) - len(HEADER)
        batch = launch.Batch(direction, t, weights, torch.device("cpu"))
        recorder.launch(batch, [[0] * len(weights)] * arrays, {})

    for direction in (launch.FORWARD, launch.BACKWARD):
        for weight in weights:
            launched(direction, [weight])
            launched(direction, [weight] * 2)
        launched(direction, weights)
    assert recorder.variants == possible
