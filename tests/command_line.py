"""The command line in this process, and checkpoints to give it."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("typer", reason="the command line needs typer")
pytest.importorskip("rich", reason="the command line needs rich")
pytest.importorskip("safetensors", reason="the command line needs safetensors")

from safetensors.torch import load_file, save_file

from wnkernel import cli
from wnkernel.cli import output

from .layers import APPLY
from .on_the_cpu import on_the_cpu

__all__ = ["on_the_cpu"]

KIND = {"legacy": "legacy", "parametrized": "torch", "folded": None}
"""By which weight norm of torch a layout is made."""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@dataclass(frozen=True)
class Ended:
    """How a run of the command line ended."""

    exit_code: int
    stdout: str
    stderr: str


def invoke(*arguments: object) -> Ended:
    """``wnkernel *arguments``."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as exit_:
        cli.main([str(a) for a in arguments])
    return Ended(exit_.value.code, out.getvalue(), err.getvalue())


def convert(source: Path, target: Path, to: str, *options: object) -> dict[str, Any]:
    """``wnkernel convert --json``, which has to succeed."""
    result = invoke("convert", source, target, "--to", to, "--json", *options)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def fails(exit_code: int, *arguments: object) -> str:
    """``wnkernel *arguments``, which has to fail with one line; returns it."""
    result = invoke(*arguments)
    assert result.exit_code == exit_code, result.stderr
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("wnkernel: ")
    assert "Traceback" not in line
    return line


def save(state: dict[str, Tensor], path: Path) -> None:
    """By the library that the name asks for."""
    (save_file if path.suffix == ".safetensors" else torch.save)(state, path)


def load(path: Path) -> Any:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def by_key(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the order, which a safetensors file does not keep."""
    return dict(sorted(state.items()))


class Net(nn.Module):
    """Every kind of layer and dim that published models have, and things that are no weight norm.

    Args:
        layout: how its weight norms are kept.
        tied: whether two of its layers share g and v.
    """

    def __init__(self, layout: str = "legacy", *, tied: bool = False) -> None:
        super().__init__()
        kind = KIND[layout]

        def normed(module: nn.Module, name: str = "weight", dim: int | None = 0) -> nn.Module:
            return module if kind is None else APPLY[kind](module, name, dim)

        self.pre = normed(nn.Conv1d(3, 8, 3, padding=1))
        self.ups = nn.ModuleList([normed(nn.ConvTranspose1d(8, 6, 4, 2, 1), dim=1)])
        self.plain = nn.Conv1d(6, 6, 1)
        self.whole = normed(nn.Linear(6, 6), dim=None)
        self.rnn = normed(normed(nn.GRU(6, 5), "weight_ih_l0"), "weight_hh_l0")
        self.norm = nn.BatchNorm1d(5)
        self.heads = nn.ModuleList([normed(nn.Linear(5, 4, bias=False)) for _ in range(2)])
        if tied:
            self.heads[1] = self.heads[0]
        self.weight_g = nn.Parameter(torch.ones(3))  # only looks like half of a pair

    def forward(self, x: Tensor) -> Tensor:
        x = self.ups[0](self.pre(x)).tanh()
        x = self.whole(self.plain(x).transpose(1, 2))
        x = self.rnn(x)[0].transpose(1, 2)
        x = self.norm(x).transpose(1, 2)
        return self.heads[1](x) + self.heads[0](x).abs() * self.weight_g[0]


WEIGHTS = {
    "pre.weight": (8, 3, 3),
    "ups.0.weight": (8, 6, 4),
    "whole.weight": (6, 6),
    "rnn.weight_ih_l0": (15, 6),
    "rnn.weight_hh_l0": (15, 5),
    "heads.0.weight": (4, 5),
    "heads.1.weight": (4, 5),
}
"""The weight norms of :class:`Net`."""

DIMS = [0, 1, None, 0, 0, 0, 0]


def trained(layout: str = "legacy", *, tied: bool = False) -> Net:
    """A net whose g are not the norms of its v."""
    net = Net(layout, tied=tied).eval()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1 * torch.randn(p.shape, generator=random)
    return net


def outputs(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net(torch.linspace(-1, 1, 60).view(2, 3, 10))


def files_in(folder: Path) -> dict[str, bytes]:
    """All files, hidden ones too, and what is in them."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are written in many pieces, even small ones."""
    monkeypatch.setattr(output, "CHUNK", 64)
