"""Steps that run one after the other, or side by side, each a process with a time limit.

A step that fails, hangs or floods its output takes no other with it, unless they say that they need
it. What steps write goes to a log on disk while they run.
"""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

PASSED, FAILED, TIMED_OUT = "passed", "FAILED", "TIMED OUT"
LEFT_OUT, CUT = "left out", "cut short"
BAD = (FAILED, TIMED_OUT)

OWN_LIMIT = "{own limit}"
"""An argument that stands for the seconds after which a command should begin nothing more."""

LEAST_S = 3.0  # With less time than this left, a step is not begun.
TAIL = 25  # Lines of the output of a step that failed, to be shown.
POLL_S = 0.02
LAST_S = 1.0  # Between the two last requests to end, and for the last of the output.
FLUSH_S = 1.0

MOST_LINES = 50_000
"""Of one step. A tool that reports every thread of every launch must not fill the disk."""

MOST_CHARACTERS = 2_000  # Of one line.


class Log:
    """Takes lines from several threads.

    A disk that is full, or any other error of the file, is said once, and ends the writing and
    nothing else.
    """

    def __init__(self, path: Path, say: Callable[[str], None] = print) -> None:
        self._path, self._say = path, say
        self._lock = threading.Lock()
        self._lines: Counter[str] = Counter()
        self._start = self._flushed = time.monotonic()
        self._file: gzip.GzipFile | None = None
        self._do(lambda: setattr(self, "_file", gzip.GzipFile(path, "wb", compresslevel=6)))

    def line(self, step: str, text: str) -> None:
        """One line, with the time since the beginning and its step."""
        with self._lock:
            self._lines[step] += 1
            if self._lines[step] == MOST_LINES:
                text = "(the rest of this step's lines is left out)"
            if self._lines[step] <= MOST_LINES:
                seconds = time.monotonic() - self._start
                self._write(f"[{seconds:6.1f} {step}] {text[:MOST_CHARACTERS]}\n")

    def flush(self) -> None:
        """Bring to the disk what was written so far, unless that was done just now."""
        with self._lock:
            self._write("")

    def close(self) -> None:
        """Nothing is written after this."""
        with self._lock:
            if self._file is not None:
                self._do(self._file.close)
            self._file = None

    def _write(self, text: str) -> None:
        if self._file is not None:
            file, is_due = self._file, time.monotonic() - self._flushed > FLUSH_S
            self._do(lambda: (file.write(text.encode()), file.flush() if is_due else None))
            self._flushed = time.monotonic() if is_due else self._flushed

    def _do(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            self._file = None
            self._say(f"{self._path} cannot be written: {error.strerror or error}")


@dataclass(frozen=True)
class Step:
    """One process."""

    name: str
    command: Sequence[str]
    limit_s: float  # The longest that it may take, its grace included.
    grace_s: float = 5.0
    """Between the request to end and the end: it has to finish what it is at, and to report."""
    beside: bool = False  # Whether it runs beside the step before it.
    decides: bool = False  # Whether nothing beside it and after it is run if it fails.
    environment: Mapping[str, str] = field(default_factory=dict)
    absent: str = ""  # Why there is nothing to run. That is no failure.
    needed: bool = True  # Whether it is a failure if the time does not suffice.

    @property
    def late(self) -> str:
        """The status if the time does not suffice."""
        return TIMED_OUT if self.needed else CUT


@dataclass(frozen=True)
class Outcome:
    """How a step went."""

    name: str
    status: str
    seconds: float
    detail: str  # The last line that it wrote, or why it did not run.
    tail: Sequence[str] = ()  # The last lines.


def run_steps(
    steps: Sequence[Step],
    cwd: Path,
    log: Log,
    deadline: float,
    say: Callable[[str], None] = print,
    *,
    then: Callable[[list[Outcome]], None] = lambda outcomes: None,
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Run all steps in a folder.

    Args:
        steps: what to run.
        cwd: where.
        log: takes everything that they write.
        deadline: when all of them must have ended, by ``clock``. Each has its own limit, and no
            more than what is left.
        say: takes the lines that tell how it goes.
        then: called after each step, or after those that ran side by side, with all outcomes.
        clock: seconds.
    """
    outcomes: list[Outcome] = []
    stopped = ""
    with _interruptible():
        for group in _side_by_side(steps):
            begun: list[Outcome | _Running] = []
            found: list[Outcome] = []
            try:
                for step in group:
                    left = min(step.limit_s, deadline - clock())
                    begun.append(
                        _not_run(step, left, stopped) or _Running(step, cwd, log, left, clock)
                    )
                    if isinstance(begun[-1], _Running):
                        say(f"{step.name}: at most {left:.0f} s ...")
                running = [r for r in begun if isinstance(r, _Running)]
                while not all([r.has_ended() for r in running]):
                    if any(r.has_failed() and r.step.decides for r in running):
                        break
                    log.flush()
                    time.sleep(POLL_S)
            finally:  # an interrupt, too, must not leave anything running
                found = [b.outcome() if isinstance(b, _Running) else b for b in begun]
                outcomes += found
                then(outcomes)
            for step, o in zip(group, found, strict=True):
                say(f"{o.name}: {o.status} after {o.seconds:.0f} s. {o.detail}")
                if o.status in BAD:
                    say("\n".join(f"    {line}" for line in o.tail))
                    stopped = stopped or (f"{o.name} {o.status}" if step.decides else "")
    return outcomes


def failed(outcomes: Sequence[Outcome]) -> bool:
    """Whether any step did not do what it should."""
    return any(o.status in BAD for o in outcomes)


def longest_s(steps: Sequence[Step]) -> float:
    """What the needed steps take at most."""
    groups = _side_by_side([step for step in steps if step.needed and not step.absent])
    return sum(max(step.limit_s for step in group) for group in groups)


def _side_by_side(steps: Sequence[Step]) -> list[list[Step]]:
    groups: list[list[Step]] = []
    for step in steps:
        if not step.beside or not groups:
            groups.append([])
        groups[-1].append(step)
    return groups


def _not_run(step: Step, left: float, stopped: str) -> Outcome | None:
    """The outcome of a step that cannot begin."""
    if why := f"nothing is run after this: {stopped}" if stopped else step.absent:
        return Outcome(step.name, LEFT_OUT, 0.0, why)
    late = Outcome(step.name, step.late, 0.0, "no time was left for it")
    return late if left < LEAST_S else None


class _Running:
    """A process, what it writes, and how it is brought to an end."""

    def __init__(
        self, step: Step, cwd: Path, log: Log, limit_s: float, clock: Callable[[], float]
    ) -> None:
        self.step, self._log, self._clock = step, log, clock
        self._start, self._limit_s = clock(), limit_s
        self._grace_s = min(step.grace_s, limit_s / 2)
        self._tail: deque[str] = deque(maxlen=TAIL)
        self._requests: Iterator[int] = iter((signal.SIGINT, signal.SIGTERM, signal.SIGKILL))
        self._next_request_s = limit_s - self._grace_s
        self._code: int | None = None
        self._is_late = False
        self._error = ""
        self._process: subprocess.Popen[bytes] | None = None
        own_limit = f"{max(limit_s - 2 * self._grace_s, 1.0):.0f}"
        command = [own_limit if argument == OWN_LIMIT else argument for argument in step.command]
        log.line(step.name, f"$ {' '.join(command)}")
        try:
            self._process = subprocess.Popen(
                command,
                cwd=cwd,
                env={**os.environ, **step.environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that the whole family can be ended
            )
        except OSError as error:
            self._error = str(error)
            log.line(step.name, self._error)
            return
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,))
        self._reader.daemon = True
        self._reader.start()

    def _read(self, stream: IO[bytes]) -> None:
        for line in stream:
            text = line.decode("utf-8", errors="replace").rstrip()
            self._log.line(self.step.name, text)
            if text:
                self._tail.append(text)

    def has_ended(self) -> bool:
        """Asks it to end when its time is over: politely first, for pytest then says what failed so
        far."""
        if self._process is None or self._code is not None:
            return True
        self._code = self._process.poll()
        if self._code is not None:
            return True
        seconds = self._clock() - self._start
        if seconds >= self._next_request_s and (request := next(self._requests, None)):
            self._is_late = True
            self._log.line(self.step.name, f"is asked to end ({signal.Signals(request).name})")
            self._signal(request)
            if request == signal.SIGINT:
                self._next_request_s = max(self._limit_s - LAST_S, seconds)
            else:
                self._next_request_s = seconds + LAST_S
        return False

    def has_failed(self) -> bool:
        """By itself, so far."""
        return self._process is None or bool(self._code)

    def outcome(self) -> Outcome:
        """How it went, after it, and whatever it started, was ended. A process that is stuck in a
        driver cannot be ended, and is left."""
        step = self.step
        if self._process is None:
            return Outcome(step.name, FAILED, 0.0, self._error)
        self._signal(signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(LAST_S)
        self._reader.join(LAST_S)
        seconds = self._clock() - self._start
        tail = list(self._tail)
        last = tail[-1].strip() if tail else "It wrote nothing."
        if self._is_late:
            status = step.late
        elif self._code:
            status = FAILED
            last = f"killed by signal {-self._code}. {last}" if self._code < 0 else last
        else:
            status = CUT if self._code is None else PASSED  # None: it was not given the time
        self._log.line(step.name, f"{status} after {seconds:.1f} s")
        return Outcome(step.name, status, seconds, last, tail)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


@contextmanager
def _interruptible() -> Iterator[None]:
    """A shell makes what it runs in the background ignore interrupts, and steps would inherit that.
    A request to terminate is an interrupt, too."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {n: signal.signal(n, interrupt) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
