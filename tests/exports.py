"""A model for the tests of exporters, and what their programs are made of."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import wnkernel


class Blocks(nn.Module):
    """The kinds of layers that carry weight norm, nested: a convolution, a transposed one that is
    normed by output channel, and a head with one norm for all of its weight."""

    def __init__(self) -> None:
        super().__init__()
        norm = wnkernel.weight_norm
        up = norm(nn.ConvTranspose1d(4, 3, 2), dim=1)
        self.body = nn.Sequential(norm(nn.Conv1d(2, 4, 3)), nn.Sequential(nn.Tanh(), up))
        self.head = norm(nn.Linear(21, 2), dim=None, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1))


def model() -> Blocks:
    return Blocks().eval()


def batch(size: int = 2) -> Tensor:
    return torch.randn(size, 2, 8)


def folded(module: nn.Module) -> nn.Module:
    plain = copy.deepcopy(module)
    wnkernel.fold(plain)
    return plain


def operators(program: torch.export.ExportedProgram) -> list[str]:
    """Every operator of a program, of the graphs within its graph too."""
    return [
        str(node.target)
        for graph in program.graph_module.modules()
        if isinstance(graph, torch.fx.GraphModule)
        for node in graph.graph.nodes
        if node.op == "call_function"
    ]


def of_ours(names: list[str]) -> list[str]:
    return [name for name in names if "wnkernel" in name]
