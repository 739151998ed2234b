"""The Triton backend: GPU kernels that need no compiler at installation."""

from .backend import TritonBackend

__all__ = ["TritonBackend"]
