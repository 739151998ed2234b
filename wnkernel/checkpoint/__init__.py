"""Checkpoints: the key layouts of weight norm, loading from all of them, and conversions.

From the bottom up: ``layouts`` (keys, dims, comparisons), ``pairs`` (g and v of one layer: found,
checked, loaded), ``legacy`` and ``loading`` (what runs in modules), ``accept`` (the same for models
that keep torch's weight norm), ``normed`` (what is under weight norm, of a dict or a model),
``convert`` (dicts alone).
"""

from .accept import LayoutHandle, accept_any_layout
from .convert import convert_state_dict
from .layouts import (
    legacy_hooks,
    legacy_keys,
    own_parametrizations,
    split_for_torch,
    split_weight,
    stacked_in,
)
from .loading import WeightNormOriginals, register_load_hook, unregister_load_hook

__all__ = [
    "LayoutHandle",
    "WeightNormOriginals",
    "accept_any_layout",
    "convert_state_dict",
    "legacy_hooks",
    "legacy_keys",
    "own_parametrizations",
    "register_load_hook",
    "split_for_torch",
    "split_weight",
    "stacked_in",
    "unregister_load_hook",
]
