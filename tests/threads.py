"""Functions that run in threads of their own, all at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .processes import PATIENCE_S


class Failure(Exception):
    """Of a hook."""


def failing_saves() -> saved_tensors_hooks:
    """Within it, a forward saves what its backward fails at."""
    return saved_tensors_hooks(lambda t: t, _fail)


def _fail(t: Tensor) -> Tensor:
    raise Failure


def together(*functions: Callable[[], object]) -> None:
    """Run each in a thread that is new; raise what one of them raised. One that hangs is left
    behind, and is an error."""
    barrier = threading.Barrier(len(functions))
    errors: list[BaseException] = []

    def run(function: Callable[[], object]) -> None:
        try:
            barrier.wait(PATIENCE_S)
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(f,), daemon=True) for f in functions]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + PATIENCE_S
    for thread in threads:
        thread.join(deadline - time.monotonic())
    for error in errors:
        raise error
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
