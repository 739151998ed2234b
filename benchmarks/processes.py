"""Contenders in processes of their own, and measurements that go round them.

What malloc did before decides whether a large weight costs page faults, and moves a contender's
time by up to 3 times. Contenders that share a process share that history, so that each is measured
in a state that the others left behind. Here everyone has a process that did nothing else. They
still take turns: whoever is not timed waits for the next command and uses no CPU.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import NamedTuple, TypeVar

from wnkernel.cli.timing import Times, in_rounds, no_garbage_collection

from .environment import Environment
from .timing import Contender, device_sampler, page_faults
from .verify import VerificationError

T = TypeVar("T")

FORK_SERVER = "forkserver"
"""Starts processes from one that has torch loaded and has done nothing with it."""

SETTLE_S = 0.005
"""Between two turns: threads of the last one spin for some milliseconds before they sleep."""

WARM_CALLS = 2, 5
"""Before a process takes part: the first calls fill caches, pools and malloc's lists. The second
figure is for calls that are short enough."""

SHORT_S = 0.1
"""Calls shorter than this are preceded by one that is not timed, for others have had the caches."""

MIN_SAMPLE_S = 30e-3
"""A turn costs settling and a message, and begins with the caches that the others left."""


def _context() -> multiprocessing.context.BaseContext:
    # torch.cuda.is_available(), wherever it is called while modules are imported, must not start
    # the driver in the process that the others are forked from
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context(FORK_SERVER if FORK_SERVER in methods else "spawn")
    if FORK_SERVER in methods:
        context.set_forkserver_preload([__name__, f"{__package__}.contenders"])
    return context


_CONTEXT = _context()


class Turn(NamedTuple):
    """What a process reports."""

    seconds: float
    cpu_s: float
    """CPU time of the process so far."""
    faults: float
    """Page faults of the turn."""


class Worker:
    """A process that runs one contender on demand, warm from the start.

    Args:
        prepare: makes the contender, in the process; has to be picklable.
        where: the environment that the process is to have.
    """

    def __init__(self, prepare: Callable[[], Contender], where: Environment) -> None:
        self._connection, self._process = _start(_serve, prepare, where)
        self.cpu_s = 0.0
        """CPU time of the process up to its last turn."""
        self.faults = 0.0
        """Page faults of all its turns."""

    def sample(self, times: int) -> float:
        """Run the contender ``times`` times, timed."""
        time.sleep(SETTLE_S)
        self._connection.send(times)
        return self.wait()

    def wait(self) -> float:
        """The seconds of the turn that is running; of the preparation, nothing."""
        turn: Turn = _receive(self._connection)
        self.cpu_s = turn.cpu_s
        self.faults += turn.faults
        return turn.seconds

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join()


def measure_apart(
    prepare: Mapping[str, Callable[[], Contender]], where: Environment, budget_s: float
) -> dict[str, Times]:
    """:func:`~wnkernel.cli.timing.in_rounds` with a process for each contender."""
    workers: dict[str, Worker] = {}
    try:
        for name, make in prepare.items():
            workers[name] = Worker(make, where)
        for worker in workers.values():
            worker.wait()
        return in_rounds(
            {name: worker.sample for name, worker in workers.items()},
            budget_s,
            least_s=MIN_SAMPLE_S,
            own_cpu_s=lambda: time.process_time() + sum(w.cpu_s for w in workers.values()),
            faults_of=lambda name: workers[name].faults,
        )
    finally:
        for worker in workers.values():
            worker.close()


def run_apart(function: Callable[[], T], where: Environment) -> T:
    """The result of a picklable function, from a process that does nothing else."""
    connection, process = _start(_answer, function, where)
    try:
        return _receive(connection)
    finally:
        connection.close()
        process.join()


def _start(
    target: Callable[..., None], function: Callable[[], object], where: Environment
) -> tuple[Connection, multiprocessing.process.BaseProcess]:
    mine, theirs = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=target, args=(theirs, function, where), daemon=True)
    process.start()
    theirs.close()
    return mine, process


def _receive(connection: Connection) -> object:
    try:
        answer = connection.recv()
    except EOFError:
        raise RuntimeError(
            "a benchmark process ended without an answer (out of memory, most often)"
        ) from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _serve(connection: Connection, prepare: Callable[[], Contender], where: Environment) -> None:
    """What a worker does: prepare, then take turns until the connection closes."""
    with _reported(connection):
        where.settle()
        run = prepare()
        sample = device_sampler(where.device)
        seconds = [sample(run, 1) for _ in range(WARM_CALLS[0])]
        is_short = min(seconds) < SHORT_S
        if is_short:
            sample(run, WARM_CALLS[1] - WARM_CALLS[0])
        with no_garbage_collection():
            connection.send(Turn(0.0, time.process_time(), 0.0))
            while True:
                times = connection.recv()
                if is_short:
                    run()
                before = page_faults()
                seconds = sample(run, times)
                faults = page_faults() - before
                connection.send(Turn(seconds, time.process_time(), faults))


def _answer(connection: Connection, function: Callable[[], object], where: Environment) -> None:
    with _reported(connection):
        where.settle()
        connection.send(function())


@contextmanager
def _reported(connection: Connection) -> Iterator[None]:
    """Send an exception to the other side, unless that has closed the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt ends the parent, and that ends us
    try:
        yield
    except (EOFError, ConnectionError):
        pass
    except VerificationError as error:
        connection.send(error)
    except Exception:
        connection.send(RuntimeError(f"in a benchmark process:\n{traceback.format_exc()}"))
