"""C++ that tests compile, once for all test processes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .processes import PATIENCE_S


def shared_folder(folders: pytest.TempPathFactory, name: str) -> Path:
    """The same one in all processes of pytest-xdist; it need not be there yet."""
    base = folders.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """One process at a time; the folder is made."""
    import fcntl  # Windows has none

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def compile_to(result: Path, command: list[str]) -> None:
    """Runs a compiler. A result is there in whole or not at all."""
    part = result.with_suffix(".part")
    command = [*command, "-o", str(part)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    part.rename(result)
