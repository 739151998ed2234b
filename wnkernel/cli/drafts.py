"""Files that are written before they have their names."""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO


class Draft:
    """A file that will be ``target``. It has no name until then where the system has such files
    (Linux, on most file systems), and is gone with the process, however that ends; elsewhere it has
    a hidden name, which stays behind if the process is killed. To take the place of another file it
    needs a hidden name for a moment everywhere.

    Args:
        target: what :meth:`place` makes of it. If it is there, the draft gets its permissions.
        named: a hidden name in any case. Files without one stay open, which only so many can.
    """

    def __init__(self, target: Path, *, named: bool = False) -> None:
        self.target = target
        self._named = named
        self._name: Path | None = None
        self.raw: BinaryIO | None = None

    def open(self) -> BinaryIO:
        """Make the file, empty. Whatever happens meanwhile, :meth:`discard` takes it away."""
        descriptor = None if self._named else _nameless(self.target.parent)
        if descriptor is None:
            self._name = hidden(self.target)
            self.raw = self._name.open("xb")
        else:
            self.raw = os.fdopen(descriptor, "wb")
        if self.target.exists():
            mode = stat.S_IMODE(self.target.stat().st_mode)
            os.chmod(self._name or self.raw.fileno(), mode)
        return self.raw

    def finish(self) -> None:
        """Nothing more will be written: it is on the disk after this."""
        assert self.raw is not None, "not open"
        self.raw.flush()
        os.fsync(self.raw.fileno())
        if self._name:
            self.raw.close()  # for systems that do not rename what is open

    def place(self, *, replace: bool) -> None:
        """Give it its name.

        Raises:
            FileExistsError: there is a file of that name, and it is not to be replaced.
            OSError: it cannot be done.
        """
        if self._name is None:
            assert self.raw is not None, "not open"
            name = hidden(self.target) if replace else self.target
            # with a descriptor, of whatever: Python follows the link to the file only then
            os.link(_path(self.raw.fileno()), name, src_dir_fd=self.raw.fileno())
            if not replace:
                return
            self._name = name
        elif not replace:
            try:
                os.link(self._name, self.target)
                self._name.unlink()
                return
            except FileExistsError:
                raise
            except OSError:  # not every file system has hard links
                if self.target.exists():
                    raise
        os.replace(self._name, self.target)

    def discard(self) -> None:
        """Take it away, if it has not been placed."""
        if self.raw:
            with suppress(OSError):  # a full disk, for what was still to be written
                self.raw.close()
        if self._name:
            with suppress(OSError):
                self._name.unlink(missing_ok=True)


def hidden(target: Path) -> Path:
    """A name beside ``target`` that nothing has."""
    return target.with_name(f".wnkernel-{secrets.token_hex(8)}.tmp")


def _nameless(folder: Path) -> int | None:
    if not hasattr(os, "O_TMPFILE"):
        return None
    try:
        descriptor = os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o666)
    except OSError:  # whatever is wrong, a file with a name shows it too
        return None
    if os.path.exists(_path(descriptor)):
        return descriptor
    os.close(descriptor)  # /proc is not there: it could never get a name
    return None


def _path(descriptor: int) -> str:
    return f"/proc/self/fd/{descriptor}"
