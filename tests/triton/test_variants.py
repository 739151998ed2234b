"""How many variants of the Triton kernels there are, counted without compiling any."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from .cases import OLDEST_TRITON

pytest.importorskip("triton", minversion=OLDEST_TRITON, reason="needs Triton")

from wnkernel.backends.triton import variants
from wnkernel.backends.triton.launch import Batch, Launcher
from wnkernel.backends.triton.plan import Kind, tiles
from wnkernel.backends.triton.tables import BACKWARD, FORWARD, HEADER, Direction, Weight
from wnkernel.backends.triton.variants import Types, Variant

DTYPES = {
    "float32": Types(torch.float32, torch.float32, torch.float32),
    "bfloat16": Types(torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "autocast": Types(torch.float32, torch.float32, torch.bfloat16),
    "float64": Types(torch.float64, torch.float64, torch.float64),
}


CPU = torch.device("cpu")


@pytest.mark.parametrize("t", DTYPES.values(), ids=DTYPES)
def test_launches_use_all_variants_that_are_stated_and_no_others(monkeypatch, t):
    known = tiles(t.v.itemsize)
    possible: set[Variant] = set()
    for direction in (FORWARD, BACKWARD):
        for rows_only, finish in ((True, 0), (False, 0), (False, 1)):
            possible.add(variants.of_list(direction, t, rows_only, finish, CPU))
        for tile in known:
            for finish in (0,) if tile.kind is Kind.ROWS else (0, 1):
                possible.add(variants.of_one(direction, t, tile, finish, CPU))
    assert len({(v.kernel, *v.choices.values()) for v in possible}) == len(possible)
    # The number that info() shows is that of float32 and half types; float64 has fewer tiles.
    assert len(possible) <= variants.most()
    assert len(possible) == variants.most() or t.v is torch.float64

    sizes = {1, 3, 1 << 18} | {tile.columns for tile in known}
    weights = [
        Weight(outer, rows, inner, vector, 0.0)
        for outer, rows, inner, vector in product(sizes, sizes, sizes, (1, t.vector))
        if outer * rows * inner <= 1 << 20
    ]
    seen: set[Variant] = set()
    monkeypatch.setattr(Variant, "launch", lambda variant, programs, args: seen.add(variant))
    launcher = Launcher()

    def launched(direction: Direction, weights: list[Weight]) -> None:
        arrays = len(direction.columns) - len(HEADER)
        batch = Batch(direction, t, weights, CPU)
        launcher.launch(batch, [[0] * len(weights)] * arrays, {})

    for direction in (FORWARD, BACKWARD):
        for weight in weights:
            launched(direction, [weight])
            launched(direction, [weight] * 2)
        launched(direction, weights)
    assert seen == possible
