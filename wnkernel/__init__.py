"""Weight normalisation for PyTorch with compiled kernels, exact to the second derivative."""

from . import functional
from ._info import info
from ._ops import cpu_buffers, release_cpu_buffers
from ._version import __version__
from .backends import use_backend
from .grouping.group import WeightNormGroup, fuse
from .parametrization import WeightNorm, remove_weight_norm, weight_norm

__all__ = [
    "WeightNorm",
    "WeightNormGroup",
    "__version__",
    "cpu_buffers",
    "functional",
    "fuse",
    "info",
    "release_cpu_buffers",
    "remove_weight_norm",
    "use_backend",
    "weight_norm",
]
