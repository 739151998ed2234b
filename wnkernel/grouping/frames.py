"""Whether a call is still running."""

from __future__ import annotations

from types import FrameType


def has_ended(frame: FrameType | None) -> bool:
    """Whether the call of a frame has returned or raised; None counts as running.

    Neither torch's modules nor its optimizers run their hooks after every exception, so what a
    hook began has to look for itself. A frame that has ended loses its local variables here.
    """
    if frame is None:
        return False
    try:
        frame.clear()
    except RuntimeError:  # refused, as it is being executed
        return False
    return True
