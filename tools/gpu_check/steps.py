"""Runs steps one after the other, or side by side. Each step is a process with a time limit.

A step that fails, hangs or floods its output stops no other step, unless that step needs it. The
output of all steps goes to a log on disk while they run.
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
"""Stands for an argument: the seconds after which a command should begin nothing more."""

LEAST_S = 3.0  # No step begins with less time than this left.
TAIL = 25  # How many lines of the output of a failed step are shown.
POLL_S = 0.02
LAST_S = 1.0  # Between the last two requests to end, and for the last output.
FLUSH_S = 1.0

MOST_LINES = 50_000
"""Per step. A tool that reports every thread of every launch must not fill the disk."""

MOST_CHARACTERS = 2_000  # Per line.


class Log:
    """Takes lines from several threads.

    The first error of the file, such as a full disk, is reported once; after that nothing more is
    written to it.
    """

    def __init__(self, path: Path, say: Callable[[str], None] = print) -> None:
        self._path, self._say = path, say
        self._lock = threading.Lock()
        self._lines: Counter[str] = Counter()
        self._start = self._flushed = time.monotonic()
        self._file: gzip.GzipFile | None = None
        self._do(lambda: setattr(self, "_file", gzip.GzipFile(path, "wb", compresslevel=6)))

    def line(self, step: str, text: str) -> None:
        """Write one line, with the time since the start and the step."""
        with self._lock:
            self._lines[step] += 1
            if self._lines[step] == MOST_LINES:
                text = "(the rest of this step's lines is left out)"
            if self._lines[step] <= MOST_LINES:
                seconds = time.monotonic() - self._start
                self._write(f"[{seconds:6.1f} {step}] {text[:MOST_CHARACTERS]}\n")

    def flush(self) -> None:
        """Bring the lines so far to the disk, unless that happened just now."""
        with self._lock:
            self._write("")

    def close(self) -> None:
        """Close the log. Later lines are dropped."""
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
    limit_s: float  # The longest time, including its grace.
    grace_s: float = 5.0
    """The time between the request to end and the end, in which the process finishes its current
    work and reports."""
    beside: bool = False  # Whether it runs beside the step before it.
    decides: bool = False  # Whether a failure stops the steps beside it and after it.
    environment: Mapping[str, str] = field(default_factory=dict)
    absent: str = ""  # Why nothing can run. This is no failure.
    needed: bool = True  # Whether a lack of time is a failure.

    @property
    def late(self) -> str:
        """The status if time is too short."""
        return TIMED_OUT if self.needed else CUT


@dataclass(frozen=True)
class Outcome:
    """The result of a step."""

    name: str
    status: str
    seconds: float
    detail: str  # The last line of the output, or why the step did not run.
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
        steps: the steps to run.
        cwd: the folder.
        log: takes all output of the steps.
        deadline: the time by ``clock`` at which all steps must have ended. Each step also has its
            own limit, but never more than the time that is left.
        say: takes the lines about the progress.
        then: called with all outcomes after each step, or after steps that ran side by side.
        clock: returns seconds.
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
            finally:  # an interrupt must not leave a process running either
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
    """Whether any step failed."""
    return any(o.status in BAD for o in outcomes)


def longest_s(steps: Sequence[Step]) -> float:
    """Return the longest time that the needed steps may take."""
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
    """Return the outcome of a step that cannot begin."""
    if why := f"nothing is run after this: {stopped}" if stopped else step.absent:
        return Outcome(step.name, LEFT_OUT, 0.0, why)
    late = Outcome(step.name, step.late, 0.0, "no time was left for it")
    return late if left < LEAST_S else None


class _Running:
    """A process, its output, and the way to end it."""

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
                start_new_session=True,  # all its processes can be ended together
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
        """Whether the process has ended. When its time is over, ask it to end; politely first,
        because pytest then reports its failures so far."""
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
        """Whether the process has failed by itself so far."""
        return self._process is None or bool(self._code)

    def outcome(self) -> Outcome:
        """End the process and all that it started, and return its outcome. A process that is stuck
        in a driver cannot be ended and is left."""
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
            status = CUT if self._code is None else PASSED  # None: it had no time to end
        self._log.line(step.name, f"{status} after {seconds:.1f} s")
        return Outcome(step.name, status, seconds, last, tail)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Make interrupts work. A shell makes its background processes ignore them, and steps would
    inherit that. A request to terminate also acts as an interrupt."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {n: signal.signal(n, interrupt) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
