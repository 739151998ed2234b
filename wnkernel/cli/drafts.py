"""Drafts: files that get their final name only after they are complete."""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO


class Draft:
    """A file that will become ``target``.

    On Linux and most file systems the draft has no name, so the system deletes it when the process
    ends in any way. Elsewhere the draft has a hidden name, and stays behind if the process is
    killed. To replace another file, every draft has a hidden name for a moment.

    Args:
        target: the final name. If that file exists, the draft gets its permissions.
        named: whether to use a hidden name in any case. A draft without a name stays open, and the
            system limits the number of open files.
    """

    def __init__(self, target: Path, *, named: bool = False) -> None:
        self.target = target
        self._named = named
        self._name: Path | None = None
        self.raw: BinaryIO | None = None

    def open(self) -> BinaryIO:
        """Make the empty file. Even if this fails half-way, :meth:`discard` deletes the file."""
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
        """End the writing, and wait until the contents are on the disk."""
        assert self.raw is not None, "not open"
        self.raw.flush()
        os.fsync(self.raw.fileno())
        if self._name:
            self.raw.close()  # some systems cannot rename an open file

    def place(self, *, replace: bool) -> None:
        """Give the draft its final name.

        Args:
            replace: whether an existing file of that name may be replaced.

        Raises:
            FileExistsError: if a file of that name exists and ``replace`` is false.
            OSError: if the system cannot give the name.
        """
        if self._name is None:
            assert self.raw is not None, "not open"
            name = hidden(self.target) if replace else self.target
            # the path is a symbolic link, which os.link follows only if it gets a src_dir_fd
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
            except OSError:  # some file systems have no hard links
                if self.target.exists():
                    raise
        os.replace(self._name, self.target)

    def discard(self) -> None:
        """Delete the draft, unless :meth:`place` has given it its name."""
        if self.raw:
            with suppress(OSError):  # close() writes the rest, for which the disk may be too full
                self.raw.close()
        if self._name:
            with suppress(OSError):
                self._name.unlink(missing_ok=True)


def hidden(target: Path) -> Path:
    """Return an unused hidden name in the folder of ``target``."""
    return target.with_name(f".wnkernel-{secrets.token_hex(8)}.tmp")


def _nameless(folder: Path) -> int | None:
    if not hasattr(os, "O_TMPFILE"):
        return None
    try:
        descriptor = os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o666)
    except OSError:  # a draft with a name will raise the same error, unless it works
        return None
    if os.path.exists(_path(descriptor)):
        return descriptor
    os.close(descriptor)  # without /proc the file could never get a name
    return None


def _path(descriptor: int) -> str:
    return f"/proc/self/fd/{descriptor}"
