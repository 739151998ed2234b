"""Whether a call is still running."""

from __future__ import annotations

import threading
from types import FrameType


def has_ended(call: FrameType | threading.Lock) -> bool:
    """Whether the call of a frame has returned or raised, or the ``with`` of a lock is over.

    Neither torch's modules nor its optimizers run their hooks after every exception, so what a
    hook began has to look for itself. A frame that has ended loses its local variables here.
    """
    if not isinstance(call, FrameType):
        return not call.locked()
    try:
        call.clear()
    except RuntimeError:  # refused, as it is being executed
        return False
    return True
