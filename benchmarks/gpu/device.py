"""Whether a device still works. After a fault, CUDA refuses everything until the process ends."""

from __future__ import annotations

import gc

import torch


def is_usable(device: torch.device) -> bool:
    """Whether the device still works, after freeing what was left behind there."""
    gc.collect()
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True
