"""Chooses the backend: the one that was asked for, or else the first one that can run."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.compiler import assume_constant_result

from .. import installation, native
from .base import Backend
from .compiled import CompiledBackend
from .eager import EagerBackend
from .operators import Operators
from .triton import TritonBackend

_triton, _eager = TritonBackend(), EagerBackend()

_compiled = (CompiledBackend("cpu"), CompiledBackend("cuda"))

BACKENDS: dict[str, Backend] = {b.name: b for b in (*_compiled, _triton, _eager)}
"""Every backend, in the order in which the automatic choice tries them."""

gpu_operators = Operators(_triton, _eager)

AUTO = "auto"


def _known(name: str, source: str) -> str | None:
    if name == AUTO:
        return None
    if name not in BACKENDS:
        names = ", ".join([AUTO, *BACKENDS])
        raise ValueError(f"{source}: expected one of {names}, got {name!r}")
    return name


class _Choice(threading.local):
    """The backend that this thread asked for; if it is None, :func:`choose` looks for one."""

    def __init__(self) -> None:
        self.forced: str | None = _ENVIRONMENT


_ENVIRONMENT = _known(os.environ.get("WNKERNEL_BACKEND", AUTO), "WNKERNEL_BACKEND")
choice = _Choice()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every weight norm of this thread on one backend inside the ``with`` block.

    A function compiled by ``torch.compile`` keeps the backend that it was traced with.

    Args:
        name: ``"cpu"``, ``"cuda"``, ``"triton"``, ``"eager"``, or ``"auto"`` for the automatic
            choice; the environment variable ``WNKERNEL_BACKEND`` sets the same for the whole
            process.

    Raises:
        ValueError: if there is no backend of that name.
        RuntimeError: if the backend cannot run on this machine; the message says why. A weight that
            the backend cannot take, for example one on another device, raises only when it is
            computed.
    """
    forced = _known(name, "backend")
    if forced is not None and (why := BACKENDS[forced].missing()):
        raise RuntimeError(f"backend {forced!r} cannot run: {'; '.join(why)}")
    previous, choice.forced = choice.forced, forced
    try:
        yield
    finally:
        choice.forced = previous


@assume_constant_result  # torch 2.4 cannot trace through a subclass of threading.local
def _forced() -> str | None:
    return choice.forced


def has_choice(v: Tensor) -> bool:
    """Return whether :func:`choose` finds a backend for ``v``. It does not if the thread asked for
    a backend that cannot take ``v``."""
    forced = _forced()
    return forced is None or BACKENDS[forced].takes(v)


def choose(v: Tensor) -> Backend:
    """Return the backend for a weight norm of ``v`` whose arguments were checked.

    Raises:
        RuntimeError: if the thread asked for a backend that cannot take ``v``.
    """
    if (forced := _forced()) is not None:
        backend = BACKENDS[forced]
        if not backend.takes(v):
            why = "; ".join(backend.reasons(v))
            raise RuntimeError(f"backend {backend.name!r} was asked for and cannot run: {why}")
        return backend
    backend = next(b for b in BACKENDS.values() if b.is_automatic(v) and b.takes(v))
    if backend.name == "eager":
        _tell_of_kernels(v.device.type)
    return backend


@assume_constant_result  # a compiler that traces the caller runs this while it traces
def _tell_of_kernels(device: str) -> None:
    """Tell the user once how to get compiled kernels for a device that runs the eager backend."""
    if installation.is_told():
        return
    has_kernels = device == "cpu" or (device == "cuda" and torch.version.hip is None)
    if has_kernels and native.can_be_built():
        installation.tell(native.load_error())
