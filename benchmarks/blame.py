"""Who of several contenders failed, so that the others can be measured without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class ContenderError(Exception):
    """One contender failed; what it raised is the cause."""

    def __init__(self, who: str) -> None:
        super().__init__(who)
        self.who = who

    def __str__(self) -> str:
        return f"{self.who}: {type(self.__cause__).__name__}: {self.__cause__}"


@contextmanager
def blamed(who: str) -> Iterator[None]:
    """Whatever is raised in here is the fault of one contender."""
    try:
        yield
    except ContenderError:
        raise
    except Exception as error:
        raise ContenderError(who) from error
