"""A limit on the memory that reading a file may take, whatever the file asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STATM = Path("/proc/self/statm")
"""The size of the process, on Linux."""


@contextmanager
def memory_limit(more: int) -> Iterator[None]:
    """Refuse the process memory beyond what it has and ``more`` bytes, files that it maps
    included, on Linux; other systems have no such limit.

    Args:
        more: bytes.
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
