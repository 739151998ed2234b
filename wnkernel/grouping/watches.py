"""The watches on new layers (wnkernel/lost_writes.py), which end before a model is changed."""

from __future__ import annotations

from collections.abc import Iterable

from ..parametrization import WeightNormList


def end_watches(lists: Iterable[WeightNormList]) -> None:
    """End the watches on lists of parametrizations, all or none of them.

    A watch that ends may warn, and warnings may be errors. The first of these is raised when all
    lost writes have been told, and everybody is watched as before.
    """
    watched = [(weights, owner) for weights in lists if (owner := weights.owner) is not None]
    error: Warning | None = None
    for _, owner in watched:
        if not owner.is_group:
            try:
                owner.end()
            except Warning as warning:
                error = error or warning
    if error is not None:
        for weights, owner in watched:
            weights.owner = owner
        raise error
