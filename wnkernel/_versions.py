"""Which versions of torch were tried, and which features some of them lack.

The tests, docs/versions.md and :func:`wnkernel.info` use or repeat these facts.
"""

from __future__ import annotations

import os
import warnings
from typing import NamedTuple

import torch

OLDEST, NEWEST = (2, 4), (2, 15)
"""The oldest and the newest torch that the tests ran with; docs/versions.md has the details."""

ANY_TORCH = "WNKERNEL_ANY_TORCH"
"""The environment variable that lets the compiled and the Triton kernels run with any torch if it
is 1."""


class Limit(NamedTuple):
    """A feature that older versions of torch lack."""

    since: tuple[int, int]
    """The first version of torch that has the feature."""
    what: str


LIMITS = {
    "sharded weights": Limit(
        (2, 12),
        "weights of sharded layers have no backward where they are read outside of a forward "
        "(a DTensor of shape [1, n] cannot be expanded)",
    ),
    "strict export of hooks": Limit(
        (2, 10), "torch.export(strict=True) takes no model with hooks, as fused ones have"
    ),
    "export of RNNs": Limit(
        (2, 10), "torch.export(strict=False) takes no RNN whose weights are parametrized"
    ),
    "triton": Limit((2, 8), "the triton backend needs Triton 3.4, which torch 2.8 brings"),
    "bits of NaN": Limit(
        (2, 8),
        "where v and w have types without kernels of their own, the bits of NaNs in float16 depend "
        "on the number of threads, as in torch's conversions",
    ),
    "scopes in graphs": Limit((2, 8), "torch.compile cannot trace `with group.scope()`"),
    "backward in graphs": Limit(
        (2, 7), "torch.compile cannot trace the backward of a training step with its forward"
    ),
    "tensor parallelism": Limit(
        (2, 7),
        "tensor parallelism of layers that were not folded may fail after their bias changed",
    ),
    "cpp_wrapper": Limit(
        (2, 6), "C++ code of torch.compile (cpp_wrapper=True) cannot call operators on lists"
    ),
    "fully_shard": Limit((2, 6), "torch.distributed.fsdp.fully_shard came with torch 2.6"),
    "layers in graphs": Limit(
        (2, 5),
        "torch.compile calls layers of torch.nn without a look into them: weights of a group share "
        "launches as others do, and equal layers that are compiled one by one are many programs",
    ),
    "nodes of Python": Limit(
        (2, 5), "compiled autograd cannot read what the nodes of the eager backend keep"
    ),
}
"""All limits, by the names that the tests use."""


def release(version: str) -> tuple[int, int]:
    """The first two numbers of a version: ``(2, 13)`` for ``"2.13.0+cpu"``."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def limits(version: str) -> list[str]:
    """The features that a version of torch lacks, in words."""
    return [limit.what for limit in LIMITS.values() if release(version) < limit.since]


def untried() -> str:
    """Why the kernels of this package do not run with this torch. The result is empty if this
    version was tried, or if :data:`ANY_TORCH` allows all versions."""
    if _any_torch() or OLDEST <= release(torch.__version__) <= NEWEST:
        return ""
    oldest, newest = (".".join(map(str, v)) for v in (OLDEST, NEWEST))
    return f"torch: expected {oldest} to {newest}, which were tried, got {torch.__version__}"


def _any_torch() -> bool:
    value = os.environ.get(ANY_TORCH, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{ANY_TORCH}: expected 0 or 1, got {value!r}")
    return value == "1"


if _reason := untried():
    warnings.warn(
        f"wnkernel: {_reason}; the eager backend runs, {ANY_TORCH}=1 asks for the others",
        stacklevel=3,  # the line that imports the package
    )
