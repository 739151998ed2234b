"""Contenders in processes of their own, and measurements that visit them in turns.

The history of malloc decides whether a large weight costs page faults, which changes a contender's
time by up to 3 times. Contenders that share a process share this history, so each is measured in a
state that the others left. Here every contender has a process that did nothing else. The processes
still take turns: while one is timed, the others wait for their next command and use no CPU.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from typing import Any, TypeVar

from wnkernel.cli.timing import Times, in_rounds

from .environment import Environment
from .timing import Contender, device_sampler, page_faults
from .verify import VerificationError

T = TypeVar("T")

SETTLE_S = 0.005  # The pause between two turns: threads spin for milliseconds before they sleep.
WARM_CALLS = 2, 5  # Calls before the first turn, and how many if they are short.
SHORT_S = 0.1  # Before shorter calls comes one that is not timed, because others used the caches.
MIN_SAMPLE_S = 30e-3  # The shortest turn: it costs a message, and begins with others' caches.

# Processes are forked from a process that has only loaded torch. Imported modules may call
# torch.cuda.is_available(), which must not start the driver in that process.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
_HAS_SERVER = "forkserver" in multiprocessing.get_all_start_methods()
_CONTEXT = multiprocessing.get_context("forkserver" if _HAS_SERVER else "spawn")
if _HAS_SERVER:
    _CONTEXT.set_forkserver_preload([__name__, f"{__package__}.contenders"])


def measure_apart(
    prepare: Mapping[str, Callable[[], Contender]], where: Environment, budget_s: float
) -> dict[str, Times]:
    """Run :func:`~wnkernel.cli.timing.in_rounds` with a process for each contender, in which a
    picklable function makes the contender."""
    cpu_s, faults = dict.fromkeys(prepare, 0.0), dict.fromkeys(prepare, 0.0)

    def sample(who: str, times: int) -> float:
        time.sleep(SETTLE_S)
        seconds, cpu_s[who], more = _result(_start(pools[who], _turn, times))
        faults[who] += more
        return seconds

    with ExitStack() as stack:
        pools = {who: stack.enter_context(_pool(where)) for who in prepare}
        prepared = [_start(pools[who], _prepare, prepare[who], where) for who in pools]
        list(map(_result, prepared))
        return in_rounds(
            {who: functools.partial(sample, who) for who in pools},
            budget_s,
            least_s=MIN_SAMPLE_S,
            own_cpu_s=lambda: time.process_time() + sum(cpu_s.values()),
            faults_of=faults.get,
        )


def run_apart(function: Callable[[], T], where: Environment) -> T:
    """Return the result of a picklable function from a process that does nothing else."""
    with _pool(where) as pool:
        return _result(_start(pool, function))


def _pool(where: Environment) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, _CONTEXT, _begin, (where,))


def _start(pool: ProcessPoolExecutor, function: Callable[..., T], *args: object) -> Future[T]:
    return pool.submit(_told, function, *args)


def _result(future: Future[T]) -> T:
    try:
        return future.result()
    except BrokenProcessPool:
        why = "a benchmark process ended without an answer (out of memory, most often)"
        raise RuntimeError(why) from None


def _begin(where: Environment) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt ends the parent, which ends us
    where.settle()


def _told(function: Callable[..., T], *args: object) -> T:
    """Call a function. Tracebacks replace its exceptions, which pickling might break."""
    try:
        return function(*args)
    except VerificationError:
        raise
    except Exception:
        raise RuntimeError(f"in a benchmark process:\n{traceback.format_exc()}") from None


_here: dict[str, Any] = {}  # The contender that this process samples.


def _prepare(make: Callable[[], Contender], where: Environment) -> None:
    run, sample = make(), device_sampler(where.device)
    seconds = [sample(run, 1) for _ in range(WARM_CALLS[0])]
    is_short = min(seconds) < SHORT_S
    if is_short:
        sample(run, WARM_CALLS[1] - WARM_CALLS[0])
    gc.collect(1)
    gc.disable()
    _here.update(sample=functools.partial(sample, run), first=run if is_short else lambda: None)


def _turn(times: int) -> tuple[float, float, float]:
    """Return seconds, the CPU time of the process so far, and the page faults of the turn."""
    _here["first"]()
    before = page_faults()
    seconds = _here["sample"](times)
    return seconds, time.process_time(), page_faults() - before
