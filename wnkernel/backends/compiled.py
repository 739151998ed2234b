"""The backends behind ``wnkernel._C``: one instance per device type that it can be built for.

They have no methods to compute with: their kernels, checks and autograd are
``torch.ops.wnkernel`` (csrc/), below the dispatcher.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import assume_constant_result

from .. import native


class CompiledBackend:
    """``torch.ops.wnkernel`` on one device type."""

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

    def reasons(self, v: Tensor) -> list[str]:
        if v.device.type != self.name:
            return [*self.missing(), f"v is on {v.device}, its kernels run on {self.name}"]
        if (found := self.missing()) or self.name != "cuda":
            return found
        return _cuda_reasons(v.device)

    def is_automatic(self, v: Tensor) -> bool:
        return True


@assume_constant_result  # torch.compile need not know how this is found out
def _cuda_reasons(device: torch.device) -> list[str]:
    if why := native.cuda_reason(device):
        built = native.BUILD_INFO["cuda_architectures"]
        return [f"{device}: {why} (wnkernel._C was built for compute capabilities {built})"]
    return []
