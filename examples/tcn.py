"""Train a temporal convolutional network (TCN) on the adding problem with four kinds of weights.

    pip install '.[examples]'
    python examples/tcn.py --out tcn            # --short takes seconds

Each sequence has 50 random numbers, two of which are marked; the network has to give their sum at
the end. Always answering 1 has a mean squared error of 1/6. The TCN is that of Bai, Kolter and
Koltun, "An Empirical Evaluation of Generic Convolutional and Recurrent Networks for Sequence
Modeling", 2018, https://arxiv.org/abs/1803.01271: causal convolutions whose dilation doubles from
block to block, two weight norms in each. The same network learns from the same batches without
weight norm, with torch's, with wnkernel's, and with wnkernel's fused into one launch.

Their init_weights() writes to conv.weight after weight_norm(), where it is lost: a weight is
computed from g and v. To set one, call wnkernel.init_weight_(conv, fn).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
import typer
from common import CONSOLE, Out, Short, done, picture, smooth
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import wnkernel

LENGTH, BATCH, CHANNELS, KERNEL = 50, 32, 24, 5
DILATIONS = (1, 2, 4, 8)
"""With kernels of 5, the last output sees 121 inputs."""

Norm = Callable[[nn.Module], nn.Module]
PLAIN, TORCH, OURS, FUSED = "no weight norm", "torch", "wnkernel", "wnkernel, fused"
NORMS: dict[str, Norm] = {
    PLAIN: lambda layer: layer,
    TORCH: nn.utils.parametrizations.weight_norm,
    OURS: wnkernel.weight_norm,
    FUSED: wnkernel.weight_norm,
}


class Block(nn.Module):
    """Two causal convolutions and a residual connection."""

    def __init__(self, channels: int, dilation: int, norm: Norm) -> None:
        super().__init__()
        self.padding = (KERNEL - 1) * dilation
        self.convs = nn.ModuleList(
            norm(nn.Conv1d(given, CHANNELS, KERNEL, dilation=dilation))
            for given in (channels, CHANNELS)
        )
        self.shortcut = nn.Conv1d(channels, CHANNELS, 1) if channels != CHANNELS else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``[example, channel, time]``, as long as the input; no output sees the future."""
        y = x
        for conv in self.convs:
            y = conv(F.pad(y, (self.padding, 0))).relu()
        return (y + self.shortcut(x)).relu()


class TCN(nn.Module):
    """Blocks of growing dilation, and a number read from the last output."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        inputs = (2, *(CHANNELS for _ in DILATIONS[1:]))
        self.blocks = nn.Sequential(
            *(Block(channels, d, norm) for channels, d in zip(inputs, DILATIONS, strict=True))
        )
        self.last = nn.Linear(CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        """One number for each sequence."""
        return self.last(self.blocks(x)[..., -1]).squeeze(-1)


def network(kind: str) -> TCN:
    """The same initial weights for every kind."""
    torch.manual_seed(0)
    model = TCN(NORMS[kind])
    if kind == FUSED:
        wnkernel.fuse(model)
    return model


def adding_problem(seed: int, examples: int = BATCH) -> tuple[Tensor, Tensor]:
    """Numbers and marks ``[example, 2, time]``, and the sums of the two marked numbers."""
    random = torch.Generator().manual_seed(seed)
    numbers = torch.rand(examples, LENGTH, generator=random)
    marks = torch.zeros(examples, LENGTH)
    marks.scatter_(1, torch.rand(examples, LENGTH, generator=random).topk(2).indices, 1.0)
    return torch.stack([numbers, marks], 1), (numbers * marks).sum(1)


def main(out: Out = Path("."), short: Short = False) -> None:
    """Train four networks side by side, and compare losses and times."""
    torch.set_num_threads(1)  # layers as small as these gain nothing by more
    models = {kind: network(kind) for kind in NORMS}
    optimizers = {kind: torch.optim.Adam(m.parameters(), 4e-3) for kind, m in models.items()}
    losses: dict[str, list[float]] = {kind: [] for kind in NORMS}
    seconds: dict[str, list[float]] = {kind: [] for kind in NORMS}
    for step in track(range(10 if short else 600), "training"):
        x, target = adding_problem(step)
        for kind, model in models.items():
            start = time.process_time()
            loss = F.mse_loss(model(x), target)
            loss.backward()
            optimizers[kind].step()
            optimizers[kind].zero_grad()
            seconds[kind].append(time.process_time() - start)
            losses[kind].append(loss.item())

    x, target = adding_problem(10**6, 200)
    with torch.no_grad():
        answers = {kind: model(x) for kind, model in models.items()}
    table = Table("weights", "error, new sequences", "1 % from torch's loss", "ms of CPU a step")
    for kind in NORMS:
        apart = np.abs(np.array(losses[kind]) / np.array(losses[TORCH]) - 1) > 0.01
        parted = f"from step {apart.argmax()}" if apart.any() else "never"
        error = F.mse_loss(answers[kind], target)
        table.add_row(kind, f"{error:.5f}", parted, f"{median(seconds[kind]) * 1e3:.1f}")
    CONSOLE.print(table)

    with picture(out / "tcn.png", 2) as (left, right):
        for kind, style in zip(NORMS, ("-", "-", "--", ":"), strict=True):
            left.semilogy(smooth(losses[kind]), style, label=kind)
        left.axhline(1 / 6, color="0.6", linewidth=1)
        left.set(xlabel="step", ylabel="squared error, mean of 20 steps", title="adding problem")
        left.legend()
        right.plot([0, 2], [0, 2], color="0.6", linewidth=1)
        for kind, color in ((PLAIN, "C0"), (FUSED, "C3")):
            right.plot(target, answers[kind], ".", color=color, markersize=4, label=kind)
        right.set(xlabel="sum of the two numbers", ylabel="answer", title="new sequences")
        right.legend()
    same = "to the last bit" if losses[OURS] == losses[FUSED] else "NOT"
    done(f"fused and not fused learn the same, {same}.", out / "tcn.png")


if __name__ == "__main__":
    typer.run(main)
