"""Many weight norms in one launch: ``fuse(model)`` and what stands behind it.

From the bottom up: ``slots`` (a weight and what it was computed from), ``modes`` and ``optimizers``
(what else counts as a change), ``batch`` (one launch), ``launches`` (the slots of
one thread, and when they are thrown away), ``members`` (the layers of a group and the modules
around them), ``scopes`` (hooks that open and close scopes), ``pickling`` (groups in pickles of
whole models), ``group`` (the public handle).
"""

from . import pickling as pickling
