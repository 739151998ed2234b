"""A model for the tests of fused models under torch.compile and tracers, and what they compare."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn

import wnkernel
from wnkernel._versions import release
from wnkernel.grouping import threads


class Net(nn.Sequential):
    """With a forward of its own: Dynamo does not compile that of ``nn.Sequential`` by itself."""

    breaks = False

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = module(x)
            if self.breaks:
                torch._dynamo.graph_break()
        return x


def model() -> Net:
    """Five weights: two in the first block, three in the last."""
    norm = wnkernel.weight_norm
    first = Net(norm(nn.Conv1d(2, 4, 3)), nn.Tanh(), norm(nn.Conv1d(4, 4, 3), dim=None))
    up = norm(nn.ConvTranspose1d(4, 3, 2), dim=1)
    last = Net(up, nn.Flatten(), norm(nn.Linear(15, 3)), norm(nn.Linear(3, 2)))
    return Net(first, nn.Tanh(), last)


def twins(reuse: str = "forward") -> tuple[Net, Net, wnkernel.WeightNormGroup]:
    """A fused model, one that is not, and the group."""
    m = model()
    twin = copy.deepcopy(m)
    return m, twin, wnkernel.fuse(m, reuse=reuse)


def randn() -> Tensor:
    return torch.randn(2, 2, 8)


def step(run: Callable, module: nn.Module, x: Tensor) -> list[Tensor]:
    """The output and the gradients of all parameters."""
    module.zero_grad()
    y = run(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in module.parameters())]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    assert all(map(torch.equal, got, want))


def by_inductor(module: nn.Module) -> Callable:
    """Compiled with the default backend, without its vectors, whose headers take a while to
    compile: what they compute is not ours."""
    quick = {"cpp.vec_isa_ok": False}
    known = torch._inductor.config.get_config_copy()
    if release(torch.__version__) < (2, 6):  # which takes no value where the default is None
        known = {key: value for key, value in known.items() if value is not None}
    options = {key: value for key, value in quick.items() if key in known}
    return torch.compile(module, fullgraph=True, options=options or None)


def change(*modules: nn.Module) -> None:
    """Without a trace in the version counters."""
    for p in (p for module in modules for p in module.parameters()):
        p.data.mul_(1.1)


def open_scopes(group: wnkernel.WeightNormGroup) -> int:
    return len(group._roster.threads.current.stack)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before counts, or is left behind."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the number of weights of every launch."""
    sizes, launch = [], threads.launch

    def counted(*args: object) -> list:
        slots = launch(*args)
        sizes.append(len(slots))
        return slots

    monkeypatch.setattr(threads, "launch", counted)
    return sizes
