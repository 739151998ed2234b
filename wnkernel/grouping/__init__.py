"""Many weight norms in one launch: ``fuse(model)`` and its implementation.

Each file builds on those named before it. ``slots`` holds a weight and the tensors that it was
computed from, ``running`` tells which calls and optimizer steps are running, ``members`` has the
layers of a group and the modules around them. ``threads`` makes launches and keeps their slots, for
each thread alone. ``scopes`` has the hooks that open and close scopes, ``pickling`` puts groups
into pickles of whole models, and ``group`` is the public handle.
"""

from . import pickling as pickling
