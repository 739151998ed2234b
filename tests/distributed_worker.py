"""What the two processes of tests/grouping/test_distributed.py need: a model, training,
comparisons, and the loop that runs scenarios over gloo.

A scenario raises if something is wrong. Each process notes in a file of its own which it began and
which it finished, and ends with the first that fails: a process group does not survive that.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import wnkernel
from wnkernel.grouping import threads

from .processes import PATIENCE_S, ROOT
from .versions import DTensor

WORLD = 2
OTHERS_S, FINISHED_S = 5, 30
"""Seconds that a process gets after its peer has failed, and after its peer has ended well. In the
first case it waits in vain, but may have something to say. In the second torch may keep it from
ending: ProcessGroupGloo's destructor joins a thread that waits for the interpreter's lock, which
the destructor holds (seen with torch 2.4.1)."""
SCENARIOS: dict[str, Callable[[], None]] = {}

Wrap = Callable[[nn.Module], nn.Module]


def each(*choices: Sequence[object]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a scenario for each choice of arguments."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        for args in choices:
            name = ", ".join([function.__name__, *map(str, args)])
            SCENARIOS[name] = lambda args=args: function(*args)
        return function

    return register


class Net(nn.Module):
    """Two blocks with two weights each, and two weights beside them."""

    reentrant: bool | None = None
    """How the blocks are checkpointed; None: not at all."""

    def __init__(self, dim: int | None, width: int = 6) -> None:
        super().__init__()
        norm = wnkernel.weight_norm
        wide = width + 2
        self.first = nn.Sequential(
            norm(nn.Linear(width, wide)), nn.Tanh(), norm(nn.Linear(wide, width), dim=dim)
        )
        self.second = nn.Sequential(
            norm(nn.Linear(width, wide), dim=1), nn.Tanh(), norm(nn.Linear(wide, width))
        )
        self.middle = norm(nn.Linear(width, 4))
        self.last = norm(nn.Linear(4, 3))

    def forward(self, x: Tensor, *skip: str) -> Tensor:
        for name in ("first", "second"):
            block = getattr(self, name)
            if self.reentrant is not None:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
            elif name not in skip:
                x = block(x)
        return self.last(self.middle(x))


ORDERS = ["fuse first", "wrap first"]

UNITS = [
    {"first.0.weight", "first.2.weight"},
    {"second.0.weight", "second.2.weight"},
    {"middle.weight", "last.weight"},
]
"""The weights of a :class:`Net` whose blocks are wrapped."""
ALL = set().union(*UNITS)


class Launched:
    """The names of the weights that every launch computed."""

    def __init__(self) -> None:
        self.names: list[set[str]] = []
        self._launch = threads.launch

    def __enter__(self) -> Launched:
        threads.launch = self._counted
        return self

    def __exit__(self, *error: object) -> None:
        threads.launch = self._launch

    def _counted(self, roster: object, *args: object) -> list:
        slots = self._launch(roster, *args)
        self.names.append({self._name(roster.members[k]().name) for k, _ in slots})
        return slots

    @staticmethod
    def _name(name: str) -> str:
        """Without what a wrapper puts in front."""
        return name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")


def net(dim: int | None = None, width: int = 6, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(dim, width)


def matrices() -> Net:
    """FSDP refuses the scalar that ``dim=None`` makes of g."""
    return net(dim=1)


def inputs(step: int, part: int = 0, width: int = 6) -> Tensor:
    """The same on all processes, which take a share each."""
    generator = torch.Generator().manual_seed(1000 * step + part)
    return torch.randn(2 * WORLD, width, generator=generator)


def share(x: Tensor) -> Tensor:
    return x.chunk(WORLD)[dist.get_rank()]


def loss(y: Tensor) -> Tensor:
    return y.square().mean()


def whole(t: Tensor | None) -> Tensor | None:
    """What all processes have of a tensor together."""
    t = t.full_tensor() if isinstance(t, DTensor) else t
    return None if t is None else t.detach().clone()


Step = Callable[[nn.Module, Callable[[int], Tensor], int], None]
Record = list[dict[str, Tensor | None]]


def train(model: nn.Module, step: Step, of: Callable[[int, int], Tensor], steps: int = 3) -> Record:
    """The gradients after every step, and the parameters after the last.

    Weight decay and momentum tell a gradient of zeros from none.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    record = []
    for k in range(steps):
        optimizer.zero_grad()
        step(model, lambda part, k=k: of(k, part), k)
        record.append({name: whole(p.grad) for name, p in model.named_parameters()})
        optimizer.step()
    return [*record, {name: whole(p) for name, p in model.named_parameters()}]


def assert_same(got: Record, want: Record) -> None:
    """The same bits. Wrappers rename parameters, and keep their order."""
    assert len(got) == len(want)
    for k, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        for (name, a), b in zip(ours.items(), theirs.values(), strict=True):
            assert (a is None) == (b is None), f"step {k}, {name}: {a} for {b}"
            assert a is None or torch.equal(a, b), f"step {k}, {name}: {(a - b).abs().max()} off"


def assert_close(got: Record, want: Record) -> None:
    """The same up to the order of summation."""
    for k, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        for (name, a), b in zip(ours.items(), theirs.values(), strict=True):
            assert (a is None) == (b is None), f"step {k}, {name}: {a} for {b}"
            if a is not None:
                torch.testing.assert_close(a, b, msg=lambda m, k=k, n=name: f"step {k}, {n}: {m}")


def one_backward(model: nn.Module, x: Callable[[int], Tensor], step: int) -> None:
    loss(model(x(0))).backward()


def fused(model: nn.Module, wrap: Wrap, order: str, **options: object) -> tuple[nn.Module, object]:
    """A model that is wrapped and fused in either order, and its group."""
    if order == "fuse first":
        group = wnkernel.fuse(model, **options)
        return wrap(model), group
    wrapped = wrap(model)
    return wrapped, wnkernel.fuse(wrapped, **options)


def check(
    wrap: Wrap,
    order: str,
    *,
    step: Step = one_backward,
    reference: Step | None = None,
    build: Callable[[], nn.Module] = net,
    exact: bool = True,
    **options: object,
) -> list[set[str]]:
    """Train a wrapped and fused model beside a wrapped one, and beside a plain one on all data.

    Returns:
        The weights of every launch.
    """
    model, twin, plain = build(), build(), build()
    with Launched() as launched:
        model, group = fused(model, wrap, order, **options)
        got = train(model, step, lambda *of: share(inputs(*of)))
    twin = wrap(twin)
    want = train(twin, step, lambda *of: share(inputs(*of)))
    (assert_same if exact else assert_close)(got, want)
    assert_close(got, train(plain, reference or step, inputs))
    group.remove()
    x = share(inputs(99))
    again = train(model, one_backward, lambda *of: x, steps=1)
    (assert_same if exact else assert_close)(
        again[:1], train(twin, one_backward, lambda *of: x, steps=1)[:1]
    )
    return launched.names


def main(rank: str, directory: str, module: str, *names: str) -> None:
    """Run scenarios of a module as one of the two processes."""
    importlib.import_module(module)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(Path(directory) / "store"), WORLD),
        rank=int(rank),
        world_size=WORLD,
        timeout=timedelta(seconds=PATIENCE_S),
    )
    with (Path(directory) / f"log{rank}").open("w", buffering=1) as log:
        for name in names:
            log.write(f"begin {name}\n")
            try:
                SCENARIOS[name]()
                dist.barrier()
            except Exception:
                log.write(traceback.format_exc())
                raise
            log.write(f"end {name}\n")
    dist.destroy_process_group()


def run_pair(module: str, names: list[str], directory: Path, deadline: float) -> dict[str, str]:
    """Run scenarios in two processes until one fails.

    Returns:
        What came of those that were run: an empty string, or what went wrong.
    """
    code = "import sys; from tests.distributed_worker import main; main(*sys.argv[1:])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    with (directory / "stderr").open("w") as stderr:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(rank), str(directory), module, *names],
                cwd=ROOT,
                env=environment | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )
            for rank in range(WORLD)
        ]
        ended = wait(processes, deadline)
    outcome = {}
    for rank, how in enumerate(ended):
        log = directory / f"log{rank}"
        for part in (log.read_text() if log.exists() else "").split("begin ")[1:]:
            name, _, rest = part.partition("\n")
            if not rest.startswith("end "):
                outcome[name] = outcome.get(name, "") + f"process {rank}, {how}:\n{rest}"
            else:
                outcome.setdefault(name, "")
    errors = (directory / "stderr").read_text()
    return outcome or {names[0]: f"no scenario was begun, {ended}: {errors[-2000:]}"}


def wait(processes: list[subprocess.Popen], deadline: float) -> list[str]:
    """How the processes ended; where one has ended, the other has not much longer."""
    while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
        for status in (p.poll() for p in processes):
            if status is not None:
                patience = OTHERS_S if status else FINISHED_S
                deadline = min(deadline, time.monotonic() + patience)
        time.sleep(0.05)
    ended = []
    for process in processes:
        hangs = process.poll() is None
        if hangs:
            process.kill()
        status = process.wait()
        ended.append("which hung" if hangs else f"which ended with status {status}")
    return ended


def assert_no_failures(module: str, family: str, directory: Path) -> None:
    """Run the scenarios of a module whose names begin with ``family``, in one pair of processes;
    after a failure another pair goes on."""
    names = [name for name in SCENARIOS if re.match(rf"{family}\b|{family}_", name)]
    failed: dict[str, str] = {}
    deadline = time.monotonic() + 2 * PATIENCE_S
    while names and time.monotonic() < deadline:
        attempt = directory / str(len(names))
        attempt.mkdir()
        outcome = run_pair(module, names, attempt, deadline)
        failed |= {name: why for name, why in outcome.items() if why}
        names = [name for name in names if name not in outcome]
    failed |= dict.fromkeys(names, "not run")
    report = "\n".join(f"{name}: {why}" for name, why in failed.items())
    assert not failed, f"{len(failed)} scenarios failed: {list(failed)}\n{report}"
