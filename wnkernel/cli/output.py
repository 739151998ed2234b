"""Writes files so that either all of them appear complete, or none of them appears."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .drafts import Draft, hidden
from .errors import CannotWrite, CliError, WrongUsage, out_of_memory
from .signals import Signals

STDOUT = 1
"""The file descriptor of standard output. If standard output is redirected to a file, the name
/dev/stdout leads to that file."""

CHUNK = 16 << 20
"""The bytes that are written at once. After each such chunk progress is shown, and signals can
interrupt the writing."""

MOST_OPEN = 100
"""The number of files that may stay open until all are written. Systems allow some hundreds."""

Advance = Callable[[int], None]
"""Takes the number of bytes that were written since the last call."""


class Outputs:
    """The files that a command writes. They get their names only in :meth:`commit`.

    Use this class in a ``with`` block. At its end the block deletes all files that were not
    committed, even if a signal ends the process.

    Args:
        inputs: files that must not be overwritten, not even through another name or a link.
        force: whether existing files may be replaced.
    """

    def __init__(self, inputs: Iterable[Path], *, force: bool) -> None:
        self._inputs = list(inputs)
        self._force = force
        self._drafts: list[Draft] = []
        self._signals = Signals("; nothing was written")

    def __enter__(self) -> Outputs:
        self._signals.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._signals.ignore()
        for draft in self._drafts:
            draft.discard()
        self._signals.__exit__(*exception)

    def check(self, path: Path) -> Path:
        """Return the file that ``path`` leads to, if it may be written.

        Raises:
            WrongUsage: if the file is one of the inputs.
            CannotWrite: if the file exists and may not be replaced, is no ordinary file or is
                standard output, or if its folder does not exist.
        """
        try:
            target = path.resolve()
            for source in self._inputs:
                if _is_one_file(target, source):
                    raise WrongUsage(f"{path}: is the input {source} itself; write to another file")
            if not target.parent.is_dir():
                raise CannotWrite(f"{path}: there is no folder {target.parent}")
            if target.is_dir():
                raise CannotWrite(f"{path}: is a folder; name a file")
            if target.exists() and not target.is_file():
                raise CannotWrite(f"{path}: is no ordinary file")
            if _is_one_file(target, STDOUT):
                raise CannotWrite(f"{path}: is standard output; name another file")
            if target.exists() and not self._force:
                raise CannotWrite(f"{path}: exists already; --force replaces it")
        except (OSError, RuntimeError) as error:  # Python raises RuntimeError for a loop of links
            raise _cannot_write(path, error) from None
        return target

    @contextmanager
    def file(self, path: Path, advance: Advance) -> Iterator[Writer]:
        """Write a file in a ``with`` block. :meth:`commit` will name it ``path``.

        Raises:
            CannotWrite: if the system refuses to write, for example because the disk is full.
            OutOfMemory: if writing needs more memory than there is.
        """
        target = self.check(path)
        writer: Writer | None = None
        try:
            draft = Draft(target, named=len(self._drafts) >= MOST_OPEN)
            self._drafts.append(draft)
            writer = Writer(draft.open(), advance)
            yield writer
            draft.finish()
        except Exception as error:
            failure = writer.failure if writer and writer.failure else error
            if isinstance(failure, OSError):
                raise _cannot_write(path, failure) from None
            raise

    def commit(self) -> list[Path]:
        """Give every file its name, and return the names."""
        self._signals.ignore()
        self._signals.check()
        made: list[Path] = []
        aside: list[tuple[Path, Path]] = []
        for draft in self._drafts:
            target = draft.target
            try:
                existed = target.exists()
                if existed and self._force and draft is not self._drafts[-1]:
                    aside.append((_set_aside(target), target))
                draft.place(replace=self._force)
            except OSError as error:
                for path in made:
                    path.unlink(missing_ok=True)
                for old, path in aside:
                    with suppress(OSError):  # on an error the old file keeps its hidden name
                        os.replace(old, path)
                        old.unlink(missing_ok=True)  # replace() does nothing for links to one file
                raise _cannot_write(target, error) from None
            if not existed:
                made.append(target)
        for old, _ in aside:
            with suppress(OSError):
                old.unlink()
        for folder in {draft.target.parent for draft in self._drafts}:
            _sync(folder)
        return [draft.target for draft in self._drafts]


def _set_aside(target: Path) -> Path:
    """Give a file that is about to be replaced a hidden name, and return that name."""
    old = hidden(target)
    try:
        os.link(target, old)
    except OSError:  # some file systems have no hard links
        os.rename(target, old)
    return old


def _is_one_file(target: Path, other: Path | int) -> bool:
    with suppress(OSError):  # one of the two does not exist
        return os.path.samestat(target.stat(), os.stat(other))
    return False


class Writer:
    """A file with the methods that :func:`torch.save` needs. It keeps the error of a failed write,
    because the error that ``torch.save`` raises then does not tell the reason."""

    def __init__(self, raw: BinaryIO, advance: Advance) -> None:
        self._raw = raw
        self._advance = advance
        self.failure: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        try:
            view = memoryview(data).cast("B")
            for start in range(0, len(view), CHUNK):
                chunk = view[start : start + CHUNK]
                self._raw.write(chunk)
                self._advance(len(chunk))
        except OSError as error:
            self.failure = error
            raise
        return len(view)

    def seek(self, position: int) -> None:
        self._raw.seek(position)

    def flush(self) -> None:
        self._raw.flush()


def _cannot_write(path: Path, error: Exception) -> CliError:
    text = getattr(error, "strerror", None) or error
    return out_of_memory(error, path) or CannotWrite(f"{path}: {text}")


def _sync(folder: Path) -> None:
    """Write the names in a folder to the disk, if the system can do this."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
