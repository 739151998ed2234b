"""What the Triton kernels compile to, for GPUs that need not be there: registers, spills, widths of
accesses, and whether a list and a single weight add up in the same order.

Some combinations of GPU and dtypes only, which takes a core two minutes; all of them,
and so fifteen, with WNKERNEL_OFFLINE_ALL=1 in the environment.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch

from .cases import OLDEST_TRITON

pytest.importorskip("triton", minversion=OLDEST_TRITON, reason="needs Triton")

from wnkernel.backends.triton.plan import Kind, tiles
from wnkernel.backends.triton.variants import Types

from .offline_checks import (
    CUOBJDUMP,
    DTYPES,
    EVERY,
    ROWS,
    Variant,
    differences,
    false_promises,
    finishes,
    over_bounds,
    spilled_bytes,
    too_narrow,
    wrong_widths,
)
from .offline_process import Ask, worker

pytestmark = pytest.mark.skipif(not CUOBJDUMP.exists(), reason=f"there is no {CUOBJDUMP}")

ALL, ROWS_ONLY = "all", "rows only"
COMBINATIONS = {
    ("cuda90", "float32"): ALL,
    ("cuda90", "mixed"): ALL,
    ("gfx942", "float32"): ALL,
    ("cuda80", "float16"): ROWS_ONLY,
    ("cuda100", "bfloat16"): ROWS_ONLY,
    ("cuda90", "float64"): ROWS_ONLY,
}
"""What is compiled. Lists hold the code of every tile, or of every tile of rows: they tell whether
everything compiles, and take the most registers; those of every tile are compiled for each maker of
GPUs, and for NVIDIA with the dtypes that took the most. The slowest come first."""
if os.environ.get("WNKERNEL_OFFLINE_ALL"):
    COMBINATIONS = dict.fromkeys(product(("cuda80", "cuda90", "cuda100", "gfx942"), DTYPES), ALL)

Cut = tuple[str, str | int, int, dict[str, Any]]
"""A direction, tiles of a list or the place of one, which launch, changes to choices."""


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """What the worker answers."""
    with worker(tmp_path_factory.mktemp("triton")) as ask:
        yield ask


@pytest.fixture
def variants(ask: Ask) -> Callable[..., list[Variant]]:
    """Compiles."""

    def variants(gpu: str, dtypes: str, *cuts: Cut) -> list[Variant]:
        requests = [
            {
                "dtypes": DTYPES[dtypes], "direction": direction, "finish": finish,
                "tile": None if isinstance(of, str) else of, "every": of == EVERY,
                "changes": changes, "disassemble": (of, finish) == (EVERY, 0),
            }
            for direction, of, finish, changes in cuts
        ]  # fmt: skip
        found = ask(gpu, requests)
        types = types_of(dtypes)
        return [Variant(types, *cut[:3], facts) for cut, facts in zip(cuts, found, strict=True)]

    return variants


def types_of(dtypes: str) -> Types:
    return Types(*(getattr(torch, name) for name in DTYPES[dtypes]))


@pytest.mark.parametrize(
    ("gpu", "dtypes", "what"), [(*combination, what) for combination, what in COMBINATIONS.items()]
)
def test_variants_keep_their_bounds_and_lists_are_like_single_weights(variants, gpu, dtypes, what):
    cuts: list[tuple[str | int, int]] = [(ROWS, 0)]
    if what != ROWS_ONLY:
        cuts += [(EVERY, 0), (EVERY, 1)]
    for k, tile in enumerate(tiles(types_of(dtypes).v.itemsize)):
        if what == ALL or tile.kind is Kind.ROWS:
            cuts += [(k, finish) for finish in finishes(tile)]
    directions = ("forward", "backward")
    compiled = variants(gpu, dtypes, *((d, *cut, {}) for d in directions for cut in cuts))
    faults: list[str] = []
    for v in compiled:
        faults += [*over_bounds(v, spilled_bytes(gpu, dtypes, v)), *false_promises(v)]
        if v.tile is not None:
            faults += wrong_widths(v)
            continue
        faults += too_narrow(v, v.branches())
        like_it = [s for s in compiled if (s.direction, s.finish) == (v.direction, v.finish)]
        faults += differences(v, [s for s in like_it if s.tile in v.branches()])
    assert not faults, "\n".join(faults)


def place(**fields: Any) -> int:
    """The first of the tiles of float32 with these fields."""
    return next(
        k
        for k, tile in enumerate(tiles(4))
        if all(getattr(tile, name) == value for name, value in fields.items())
    )


def test_mutants_of_single_weights_are_found(variants):
    aligned = place(kind=Kind.ROWS, aligned=True)
    unaligned = place(kind=Kind.ROWS, aligned=False)
    strips = place(kind=Kind.STRIPS, aligned=True)
    longest = max(range(len(tiles(4))), key=lambda k: tiles(4)[k].columns)
    good, scalar, halves, second, wide, large = variants(
        "cuda90",
        "float32",
        ("forward", aligned, 0, {}),
        ("forward", aligned, 0, {"VECTOR": 1}),
        ("forward", aligned, 0, {"VECTOR": 2}),
        ("backward", strips, 1, {"VECTOR": 1}),
        ("forward", unaligned, 0, {"VECTOR": 4}),
        ("backward", longest, 0, {"COLUMNS": 4 * tiles(4)[longest].columns}),
    )
    assert not [*over_bounds(good), *wrong_widths(good)]
    for mutant in (scalar, halves, second):
        said = "\n".join(wrong_widths(mutant))
        for fault in ("loads of 16 bytes", "stores of 16 bytes", "narrow loads", "narrow stores"):
            assert fault in said
    assert "may not allow" in "\n".join(wrong_widths(wide))
    said = "\n".join(over_bounds(large))
    assert "registers" in said
    assert "spilled" in said


@pytest.mark.parametrize("gpu", ["cuda90", "gfx942"])
def test_mutants_of_lists_are_found(variants, gpu):
    """Lists of one tile, which are quick to compile."""
    k = place(kind=Kind.ROWS, aligned=True)
    tile = tiles(4)[k]
    short = {"COUNT": 1, "TILES": [[int(tile.kind), tile.lines, tile.columns, int(tile.aligned)]]}
    single, good, unaligned, fused, unfused = variants(
        gpu,
        "float32",
        ("backward", k, 0, {}),
        ("backward", EVERY, 0, short),
        ("backward", EVERY, 0, short | {"VECTOR": 1}),
        ("backward", EVERY, 0, short | {"enable_fp_fusion": True}),
        ("backward", EVERY, 0, short | {"enable_fp_fusion": False}),
    )
    assert not [*over_bounds(good), *too_narrow(good, [tile]), *differences(good, [single])]
    assert "of 16 bytes too few" in "\n".join(too_narrow(unaligned, [tile]))
    said = "\n".join(differences(unaligned, [single]))
    for fault in ("of 16 bytes too few", "only single weights reduce axis 1", "only it reduces"):
        assert fault in said
    assert "fused" in "\n".join(differences(fused, [unfused]))


def test_arguments_do_not_make_variants(ask):
    found = ask("cuda90")
    kernels = ("forward_one", "forward_list", "backward_one", "backward_list")
    assert found["as launched"] == {kernel: [] for kernel in kernels}
    mutant = found["mutant"]
    assert {"rows", "v", "eps_bits", "compiled more than once"} <= set(mutant["forward_one"])
    assert {"table", "line_of", "partials"} <= set(mutant["forward_list"])
