"""Attacks with random cases: some hundreds with all other tests, as many as you like by
``WNKERNEL_FUZZ_CASES``."""

from __future__ import annotations

import os


def cases(default: int) -> int:
    """How many cases a test tries: what the environment says, or its own number."""
    return int(os.environ.get("WNKERNEL_FUZZ_CASES") or default)
