"""Steps that run one after the other, each a process with a time limit; none stops the next."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

PASSED, FAILED, TIMED_OUT = "passed", "FAILED", "TIMED OUT"
LEFT_OUT, CUT = "left out", "cut short"
BAD = (FAILED, TIMED_OUT)

MARK = ">>>>>"
"""Before lines of the log that no step wrote."""

OWN_LIMIT = "{own limit}"
"""An argument that stands for the seconds after which a command should begin nothing more."""

MARGIN_S = 15.0
"""Between that and the end of its time: it has to start, and to finish what it is at."""

LEAST_S = 5.0
"""With less time than this left, a step is not begun."""

GRACE_S = 5.0
"""Between the request to end and the end."""

TAIL = 25
"""Lines of the output of a step that failed, to be shown."""


@dataclass(frozen=True)
class Step:
    """One process."""

    name: str
    command: Sequence[str]
    limit_s: float
    """The longest that it may take."""
    reserve_s: float = 0.0
    """How much of the whole time the steps before it have to leave."""
    environment: Mapping[str, str] = field(default_factory=dict)
    absent: str = ""
    """Why there is nothing to run. That is no failure."""
    needed: bool = True
    """Whether it is a failure if the time does not suffice."""


@dataclass(frozen=True)
class Outcome:
    """How a step went."""

    name: str
    status: str
    seconds: float
    detail: str
    """The last line that it wrote, or why it did not run."""
    tail: Sequence[str] = ()
    """The last lines."""


def run_steps(
    steps: Sequence[Step], cwd: Path, log: Path, limit_s: float, say: Callable[[str], None] = print
) -> list[Outcome]:
    """Run all steps, in ``cwd``, with everything they write going to a log file.

    Args:
        steps: what to run.
        cwd: where.
        log: appended to.
        limit_s: for all steps together; each gets what is left, less the reserves of later ones.
        say: takes the lines that tell how it goes.
    """
    deadline = time.monotonic() + limit_s
    outcomes = []
    for i, step in enumerate(steps):
        reserved = sum(later.reserve_s for later in steps[i + 1 :] if not later.absent)
        left = min(step.limit_s, deadline - time.monotonic() - reserved)
        if not step.absent:
            say(f"{step.name}: at most {max(left, 0):.0f} s ...")
        outcome = _run(step, cwd, log, left)
        outcomes.append(outcome)
        say(f"{step.name}: {outcome.status} after {outcome.seconds:.0f} s. {outcome.detail}")
        if outcome.status in BAD:
            for line in outcome.tail:
                say(f"    {line}")
    return outcomes


def _run(step: Step, cwd: Path, log: Path, limit_s: float) -> Outcome:
    if step.absent:
        return Outcome(step.name, LEFT_OUT, 0.0, step.absent)
    late = TIMED_OUT if step.needed else CUT
    if limit_s < LEAST_S:
        return Outcome(step.name, late, 0.0, "no time was left for it")
    own_limit = f"{max(limit_s - MARGIN_S, 1.0):.0f}"
    command = [own_limit if argument == OWN_LIMIT else argument for argument in step.command]
    start = time.monotonic()
    with log.open("a", encoding="utf-8") as out:
        out.write(f"\n{MARK} {step.name}: {' '.join(command)}\n")
        out.flush()
        begin = out.tell()
        try:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env={**os.environ, **step.environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that the whole family can be ended
                preexec_fn=_heed_interrupts,
            )
        except OSError as error:
            out.write(f"{error}\n")
            return Outcome(step.name, FAILED, 0.0, str(error))
        code: int | None = None
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            out.write(f"\n{MARK} {step.name}: ended after {limit_s:.0f} s\n")
        finally:  # an interrupt, too, must not leave it running
            _end(process)
    tail = _tail(log, begin)
    last = tail[-1].strip() if tail else "It wrote nothing."
    seconds = time.monotonic() - start
    if code is None:
        return Outcome(step.name, late, seconds, last, tail)
    if code < 0:
        return Outcome(step.name, FAILED, seconds, f"killed by signal {-code}. {last}", tail)
    return Outcome(step.name, FAILED if code else PASSED, seconds, last, tail)


def _heed_interrupts() -> None:
    """A shell makes what it runs in the background ignore them, and that is inherited."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it started, if anything of it still runs: politely first, for pytest
    then says what failed so far."""
    for request in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, request)
        except ProcessLookupError:
            return
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
            time.sleep(0.1)  # for its children to follow


def _tail(log: Path, begin: int) -> list[str]:
    """The last lines that a step wrote."""
    with log.open("rb") as file:
        file.seek(begin)
        text = file.read().decode("utf-8", errors="replace")
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return [line for line in lines if not line.startswith(MARK)][-TAIL:]


def print_outcomes(console: Console, outcomes: Sequence[Outcome]) -> None:
    """A line for each step."""
    table = Table(title="Steps", title_justify="left", header_style="bold")
    for head in ("step", "", "s", "last line"):
        table.add_column(head, justify="right" if head == "s" else "left")
    for o in outcomes:
        status = f"[red]{o.status}[/red]" if o.status in BAD else o.status
        table.add_row(o.name, status, f"{o.seconds:.0f}", escape(o.detail))
    console.print(table)


def failed(outcomes: Sequence[Outcome]) -> bool:
    """Whether any step did not do what it should."""
    return any(o.status in BAD for o in outcomes)
