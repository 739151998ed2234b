"""The backends behind ``wnkernel._C``, one for each device type that it can be built for.

This file computes nothing. The kernels, checks and autograd of these backends are in csrc/, and are
called through ``torch.ops.wnkernel``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import assume_constant_result

from .. import native


class CompiledBackend:
    """``torch.ops.wnkernel`` on one device type."""

    is_compiled = True

    def __init__(self, name: str) -> None:
        self.name = name

    def missing(self) -> list[str]:
        if not native.loaded():
            return [native.load_error()]
        if self.name == "cuda" and torch.version.hip is not None:
            return ["its kernels are for NVIDIA GPUs, on AMD's those of triton run"]
        if self.name not in native.BUILD_INFO["devices"]:
            return [f"wnkernel._C was built without {self.name} kernels"]
        if self.name == "cuda" and not torch.cuda.is_available():
            return ["there is no GPU that torch can use"]
        return []

    def takes(self, v: Tensor) -> bool:
        if v.device.type != self.name or self.name not in native.BUILD_INFO.get("devices", ()):
            return False
        return self.name != "cuda" or not (self.missing() or _cuda_reason(v.device))

    def reasons(self, v: Tensor) -> list[str]:
        found = self.missing()
        if v.device.type != self.name:
            found.append(f"v is on {v.device}, its kernels run on {self.name}")
        elif self.name == "cuda" and not found and (why := _cuda_reason(v.device)):
            built = f"built for compute capabilities {native.BUILD_INFO['cuda_architectures']}"
            found.append(f"{v.device}: {why} (wnkernel._C was {built})")
        return found

    def is_automatic(self, v: Tensor) -> bool:
        return True

    def has_operators(self, v: Tensor) -> bool:
        return True

    def norm(self, v: Tensor, g: Tensor, dim: int, eps: float) -> Tensor:
        return torch.ops.wnkernel.forward_one(v, g, dim, eps)[1]


@assume_constant_result  # torch.compile takes the result as a constant and traces nothing
def _cuda_reason(device: torch.device) -> str:
    return native.cuda_reason(device)
