"""Checkpoints: loading from every key layout of weight norm, and conversions between them.

Each file builds on those named before it. ``agreement`` compares the entries of a dict for one
weight, and ``pairs`` finds, checks and loads g and v of one layer. ``legacy`` and ``loading`` run
when modules load, ``accept`` when models that keep torch's weight norm load. ``normed`` finds the
weight norms of a dict, and ``convert`` converts dicts alone.
"""

from .accept import LayoutHandle, accept_any_layout
from .convert import convert_state_dict
from .loading import WeightNormOriginals, register_load_hook, unregister_load_hook

__all__ = [
    "LayoutHandle",
    "WeightNormOriginals",
    "accept_any_layout",
    "convert_state_dict",
    "register_load_hook",
    "unregister_load_hook",
]
