"""Limits the memory of the process while a file is read that may ask for too much."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STATM = Path("/proc/self/statm")
"""The file in which Linux tells the size of the process."""


@contextmanager
def memory_limit(more: int) -> Iterator[None]:
    """Limit the address space of the process in a ``with`` block. Only Linux has such a limit;
    elsewhere nothing happens.

    Args:
        more: the bytes that the process may take beyond its present size. Mapped files count too.
    """
    if not STATM.exists():
        yield
        return
    import resource

    before = soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(STATM.read_text().split()[0])
    limits = [pages * resource.getpagesize() + more, soft, hard]
    limit = min(value for value in limits if value != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
