"""What tests ask of the process that runs kernels, and what it answers.

That process imports this package by another name: as ``simt``, for ``tests`` imports torch, which
takes seconds under a sanitizer.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

PROCESSORS, BLOCKS_OF_PROCESSOR = 132, 3
"""Of the card that there would be."""
UNWRITTEN = 0x7B
"""The bytes of results before the call: a finite number in every type."""


@dataclass(frozen=True)
class Problem:
    """A line of the problem table. Arrays that are in neither dict are null."""

    inputs: dict[str, bytes]
    outputs: dict[str, int]
    """How many bytes they have. Those that are inputs, too, are changed in place."""
    fields: dict[str, int | float]
    offsets: dict[str, int]
    """Bytes from 16-byte boundaries to arrays, where there are some."""
    same: dict[str, str] = field(default_factory=dict)
    """Outputs that are in the memory of an input."""


@dataclass(frozen=True)
class Call:
    """Of forward_cuda or backward_cuda."""

    direction: str
    problems: Sequence[Problem]
    order: int = 0
    """Of threads: a simt::Order."""
    failing_launch: int = -1
    processors: int = PROCESSORS
    mutant: int = 0
    """Of a library that has some."""


class Launch(NamedTuple):
    blocks: int
    threads: int
    on_stream: bool
    """Whether on the stream that the call named."""
    argument_bytes: int


@dataclass(frozen=True)
class Called:
    """What came of it."""

    error: int
    launches: list[Launch]
    workspaces: list[int]
    """How many bytes were asked for."""
    outputs: list[dict[str, bytes]]


@dataclass(frozen=True)
class Ends:
    """The forward of a float32 weight ``[outer, rows, inner]``, 0 but for its first row, which is
    1, and its last, which is 2; g is 3. It may be larger than memory: only its first and its last
    block run."""

    view: Sequence[int]
    mutant: int = 0


class View(NamedTuple):
    """Arguments of make_plan."""

    outer: int
    rows: int
    inner: int
    element_bytes: int
    vector: int


@dataclass(frozen=True)
class Plans:
    """Calls of make_plan and parts_of_block, all at once."""

    views: Sequence[View]
    places: int = PROCESSORS * BLOCKS_OF_PROCESSOR
    """Blocks that a card runs at a time."""


class Plan(NamedTuple):
    """The fields of wnkernel::cuda::Plan, and what follows from them."""

    rows: int
    inner: int
    lines: int
    pitch: int
    numel: int
    width: int
    strip_rows: int
    across: int
    tiles: int
    per_part: int
    parts: int
    kind: int
    vector: int
    log_x: int
    log_across: int
    per_block: int
    blocks: int
    partial_sums: int


@dataclass(frozen=True)
class Numbers:
    """The constants of csrc/cuda, which a worker fills in."""

    threads: int = 0
    warp: int = 0
    vector_bytes: int = 0
    strip_bytes: int = 0
    row_vectors: int = 0
    fill: int = 0
    split_from: int = 0
    strip_tiles: int = 0
    strip_parts: int = 0
    tiles_of_more_parts: int = 0
    few_lines: int = 0
    most_lines: int = 0


ROWS, RUNS, STRIPS = range(3)
"""wnkernel::cuda::Kind."""


@dataclass(frozen=True)
class Rounded:
    """float32 numbers as half types and back."""

    numbers: bytes


@dataclass(frozen=True)
class Takes:
    """Calls of cuda_takes, for all pairs of this many types."""

    types: int


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return globals()[name]


def read(file: IO[bytes]) -> Any:
    """The next object. EOFError if there is none."""
    return _Reader(file).load()


def write(what: object, file: IO[bytes]) -> None:
    pickle.dump(what, file)
    file.flush()
