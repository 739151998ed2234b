"""Many weight norms in one launch: ``fuse(model)`` and what stands behind it.

From the bottom up: ``slots`` holds a weight and what it was computed from, ``running`` knows calls
and optimizer steps that are under way, ``members`` the layers of a group and the modules around
them. ``threads`` makes launches and keeps their slots, for each thread on its own. ``scopes`` has
the hooks that open and close scopes, ``pickling`` puts groups into pickles of whole models, and
``group`` is the public handle.
"""

from . import pickling as pickling
