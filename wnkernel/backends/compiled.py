"""The backends behind ``wnkernel._C``: one instance per device type that it can be built for.

They have no methods to compute with: their kernels, checks and autograd are
``torch.ops.wnkernel`` (csrc/), below the dispatcher.
"""

from __future__ import annotations

from torch import Tensor

from .. import _ops


class CompiledBackend:
    """``torch.ops.wnkernel`` on one device type."""

    def __init__(self, name: str) -> None:
        self.name = name

    def missing(self) -> list[str]:
        if not _ops.loaded():
            return [_ops.load_error()]
        if self.name not in _ops.BUILD_INFO["devices"]:
            return [f"wnkernel._C was built without {self.name} kernels"]
        return []

    def reasons(self, v: Tensor) -> list[str]:
        found = self.missing()
        if v.device.type != self.name:
            found.append(f"v is on {v.device}, its kernels run on {self.name}")
        return found

    def is_automatic(self, v: Tensor) -> bool:
        return True
