"""A model with a matrix, a kernel, biases and gains, and what it is trained with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    layers = nn.LayerNorm(6), nn.Linear(6, 5), nn.Tanh(), nn.Unflatten(1, (1, 5))
    return nn.Sequential(*layers, nn.Conv1d(1, 3, 2)).to(dtype)


def loss(m: nn.Module, k: int = 0) -> Tensor:
    """Another one in each step."""
    dtype = next(m.parameters()).dtype
    x = torch.linspace(1, 5, 48, dtype=dtype).view(8, 6)
    y = torch.linspace(-1, 1, 96, dtype=dtype).view(8, 3, 4)
    return (m((x * (k + 1)).sin()) - y).square().mean()


def step(optimizer: Optimizer, m: nn.Module, k: int = 0) -> None:
    optimizer.zero_grad()
    loss(m, k).backward()
    optimizer.step()


def matrices(m: nn.Module) -> list[nn.Parameter]:
    return [p for p in m.parameters() if p.ndim > 1]
