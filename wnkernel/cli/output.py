"""Files that appear whole and together, or not at all."""

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
"""The file descriptor. A name such as /dev/stdout leads to the file that it is redirected to."""

CHUNK = 16 << 20
"""Bytes written at once: how often progress is told and signals are heard."""

MOST_OPEN = 100
"""Files that are kept open until all are written: systems allow some hundreds."""

Advance = Callable[[int], None]
"""Is told how many bytes were written."""


class Outputs:
    """The files that a command writes, without their names until :meth:`commit`.

    Used in a ``with`` block, which takes what was not committed away, also when the process is
    told to end.

    Args:
        inputs: files that must not be written to, by whatever name.
        force: whether files that are there may be replaced.
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
        """The file that ``path`` leads to, if it may be written.

        Raises:
            WrongUsage: it is one of the inputs.
            CannotWrite: it is there and may not be replaced, or its folder is not there.
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
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
            raise _cannot_write(path, error) from None
        return target

    @contextmanager
    def file(self, path: Path, advance: Advance) -> Iterator[Writer]:
        """A file that will be ``path``.

        Raises:
            CannotWrite: the system does not let us, or the disk is full.
            OutOfMemory: there is no memory for what is to be written.
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
        """Give every file its name; returns the names."""
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
                    with suppress(OSError):  # then it stays where it is
                        os.replace(old, path)
                        old.unlink(missing_ok=True)  # two names of one file do not become one
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
    """Keep a file that is about to be replaced, under another name too."""
    old = hidden(target)
    try:
        os.link(target, old)
    except OSError:  # not every file system has hard links
        os.rename(target, old)
    return old


def _is_one_file(target: Path, other: Path | int) -> bool:
    with suppress(OSError):  # one of them is not there
        return os.path.samestat(target.stat(), os.stat(other))
    return False


class Writer:
    """As much of a file as :func:`torch.save` asks for, and where it went wrong: the error that
    comes out of ``torch.save`` does not say."""

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
    """Make names last, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
