"""The names of g and v: in state dicts, in modules and in lists of parametrizations.

======================  =====================================  ==========================
layout                  g                                      v
======================  =====================================  ==========================
parametrized (new)      ``parametrizations.<name>.original0``  ``....<name>.original1``
legacy                  ``<name>_g``                           ``<name>_v``
folded (plain)          none: ``<name>`` holds ``w``
======================  =====================================  ==========================
"""

from __future__ import annotations

G, V = "original0", "original1"
"""The names of g and v in a ``ParametrizationList``."""

PARAMETRIZED, LEGACY, FOLDED = "parametrized", "legacy", "folded"
LAYOUTS = (PARAMETRIZED, LEGACY, FOLDED)


def parametrized_keys(name: str) -> tuple[str, str]:
    """Keys of g and v, below the layer's prefix, in the parametrized layout."""
    return f"parametrizations.{name}.{G}", f"parametrizations.{name}.{V}"


def legacy_keys(name: str) -> tuple[str, str]:
    """Keys of g and v, below the layer's prefix, in the legacy layout."""
    return f"{name}_g", f"{name}_v"


def weight_keys(key: str, layout: str) -> tuple[str, ...]:
    """The keys of a weight in a layout: ``key`` itself if folded, the keys of g and v otherwise."""
    return (key,) if layout == FOLDED else pair_keys(key, layout)


def pair_keys(key: str, layout: str) -> tuple[str, str]:
    """The keys of g and v, in the parametrized or the legacy layout, of the weight with folded key
    ``key``."""
    prefix, dot, name = key.rpartition(".")
    names = parametrized_keys(name) if layout == PARAMETRIZED else legacy_keys(name)
    return prefix + dot + names[0], prefix + dot + names[1]
