"""Checkpoints: loading from every key layout of weight norm, and conversions between them.

From the bottom up: ``agreement`` (whether what a dict says of a weight fits together), ``pairs``
(g and v of one layer: found, checked, loaded), ``legacy`` and ``loading`` (what runs in modules),
``accept`` (the same for models that keep torch's weight norm), ``normed`` (the census of a dict),
``convert`` (dicts alone).
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
