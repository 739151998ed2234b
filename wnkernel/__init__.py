"""Weight normalisation for PyTorch with compiled kernels, exact to the second derivative."""

from . import functional
from ._info import info
from ._version import __version__
from .backends import use_backend
from .parametrization import WeightNorm, remove_weight_norm, weight_norm

__all__ = [
    "WeightNorm",
    "__version__",
    "functional",
    "info",
    "remove_weight_norm",
    "use_backend",
    "weight_norm",
]
