"""Whole processes: memory that stays or runs out, forks, and how the interpreter ends."""

from __future__ import annotations

import json
import sys

import pytest

from ..processes import python
from . import cases

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, as Linux has it")

FORK = """
import os
import torch
from tests.groups import Net, assert_same_models, twins
torch.set_num_threads(1)  # as DataLoader does in its workers; torch itself hangs with more
model, twin, group = twins("{reuse}")
assert_same_models(model, twin)
with group.scope():
    model.head.weight
    child = os.fork()
    assert_same_models(model, twin)
    group.refresh()
    assert_same_models(model, twin)
group.remove()
assert_same_models(model, twin)
if child:
    assert os.waitpid(child, 0)[1] == 0
os._exit(0)
"""

AT_THE_END = """
import atexit, threading
import torch
from tests.groups import Net, twins
torch.set_num_threads(1)
model, twin, group = twins("{reuse}")
held = group.scope()
held.__enter__()  # and never left
kept = model.head.weight
begun = threading.Event()
def forever(*_):  # in Python: torch ends the process with SIGABRT where a thread is in its code
    begun.set()
    threading.Event().wait()
hook = model.back.register_forward_pre_hook(forever)
threading.Thread(target=model, daemon=True).start()
begun.wait()
hook.remove()
@atexit.register
def _():
    assert torch.equal(model.head.weight, twin.head.weight)
    print("ended")
"""


@linux
@pytest.mark.parametrize("reuse", ["forward", "version"])
def test_fork_after_use(reuse):
    # Where a library has threads, Python warns of a fork from 3.12 on.
    done = python("-c", FORK.format(reuse=reuse), PYTHONWARNINGS="ignore::DeprecationWarning")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("reuse", ["forward", "version"])
def test_the_interpreter_ends_while_a_thread_is_in_a_forward(reuse):
    done = python("-c", AT_THE_END.format(reuse=reuse))
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")


@linux
def test_steps_leave_nothing_behind():
    done = python("-m", "tests.fuzz.soak", str(cases(300)))
    assert done.returncode == 0, done.stdout + done.stderr


@linux
def test_too_little_memory_harms_nothing():
    done = python("-m", "tests.fuzz.limits", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert {"forward", "backward"} <= json.loads(done.stdout).keys()
