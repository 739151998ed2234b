"""Weight normalisation for PyTorch with compiled kernels, exact to the second derivative."""

from . import _program, _versions, functional  # noqa: F401 (both run code on import)
from ._info import info
from ._version import __version__
from .after_step import normalize_after_step
from .backends import use_backend
from .checkpoint import accept_any_layout, convert_state_dict
from .forced_layers import forced_weight_norm
from .forcing import ForcedWeightNorm
from .grouping.group import WeightNormGroup, fuse
from .initialisation import data_dependent_init_, init_weight_
from .layers import remove_weight_norm, weight_norm
from .model import convert, fold
from .native import cpu_buffers, release_cpu_buffers
from .norm_module import WeightNorm
from .normalizing import normalize_, norms_of
from .patching import patch_torch

__all__ = [
    "ForcedWeightNorm",
    "WeightNorm",
    "WeightNormGroup",
    "__version__",
    "accept_any_layout",
    "convert",
    "convert_state_dict",
    "cpu_buffers",
    "data_dependent_init_",
    "fold",
    "forced_weight_norm",
    "functional",
    "fuse",
    "info",
    "init_weight_",
    "normalize_",
    "normalize_after_step",
    "norms_of",
    "patch_torch",
    "release_cpu_buffers",
    "remove_weight_norm",
    "use_backend",
    "weight_norm",
]
