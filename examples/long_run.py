"""Train the vocoder of train_vocoder.py for 20,000 steps, and kill one of the runs again and again.

    pip install '.[examples]'
    python examples/long_run.py --out long      # hours; --short takes half a minute

There are five runs with the same initial weights and batches, each in its own process. One uses
torch's weight norm. Two use torch's with every g moved up, or down, to the next float32 number at
the start, to show how far one rounding drives training apart. One uses wnkernel's fused. The last
one uses wnkernel's fused too, but its process is killed (SIGKILL) at random moments, and the next
process goes on from the last checkpoint. The fused curve should be as far from torch's three curves
as these are from each other. The killed run must equal the fused run to the last bit.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import time
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from common import Short
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from train_vocoder import (
    ARCTIC,
    FUSED,
    HOP,
    LEARNING_RATE,
    TORCH,
    cut,
    distance,
    generator,
    load,
    log_mel,
    move_g,
)

KILLED = "wnkernel, fused, killed"
OF_TORCH = {TORCH: 0.0, "torch, g one up": math.inf, "torch, g one down": -math.inf}
"""The runs with torch's weight norm, and the number towards which each one moves g at the start."""
RUNS = (*OF_TORCH, FUSED, KILLED)
SEGMENT = 16
"""The spectrogram frames of a training example: a quarter of a second."""
SAVED_EVERY = 250
"""The steps between two checkpoints."""
BLOCK = 500
"""The steps whose losses are averaged, because single steps differ by their batches."""
SEED = 0


def batch(audio: Tensor, mel: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Return the training examples of a step. They depend on nothing but the number of the step."""
    chosen = torch.Generator().manual_seed(step)
    starts = torch.randint(len(audio) // HOP - SEGMENT, (2,), generator=chosen).tolist()
    return cut(audio, mel, starts, SEGMENT)


def train(name: str, path: Path, steps: int, saved_every: int) -> None:
    """Train the vocoder of a run up to the last step, from its last checkpoint if there is one."""
    torch.set_num_threads(1)
    audio = load(ARCTIC)
    mel = log_mel(audio)
    model = generator(TORCH if name in OF_TORCH else FUSED, SEED)
    if towards := OF_TORCH.get(name):
        move_g(model, towards)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.8, 0.99))
    losses: list[float] = []
    if path.exists():
        saved = torch.load(path)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        losses = saved["losses"]
    for step in range(len(losses), steps):
        mels, real = batch(audio, mel, step)
        loss = distance(model(mels), real)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) % saved_every == 0 or len(losses) == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            beside = path.with_suffix(".part")
            torch.save({**state, "losses": losses}, beside)
            os.replace(beside, path)


def killed(arguments: tuple[str, Path, int, int], kills: int, short: bool) -> int:
    """Call :func:`train` in other processes, and kill the first ``kills`` of them. Return how many
    were killed before they were done. The short form kills a process at the first checkpoint."""
    moments, done = random.Random(SEED), 0
    while True:
        child = multiprocessing.get_context("spawn").Process(target=train, args=arguments)
        child.start()
        kill = done < kills
        while short and kill and not arguments[1].exists() and child.is_alive():
            time.sleep(0.01)
        child.join((0 if short else moments.uniform(10, 60)) if kill else None)
        if not child.is_alive():
            break
        child.kill()
        child.join()
        done += 1
    if child.exitcode != 0:
        raise SystemExit(child.exitcode)
    return done


def run(name: str, path: Path, steps: int, kills: int, short: bool) -> tuple[pd.DataFrame, int]:
    """Train one of the runs. Return the losses, and how many processes were killed. Processes take
    seconds to start, so in the short form only the killed run has its own."""
    arguments = name, path, steps, 4 if short else SAVED_EVERY
    count = 0
    if short and name != KILLED:
        train(*arguments)
    else:
        count = killed(arguments, kills if name == KILLED else 0, short)
    losses = torch.load(path)["losses"]
    return pd.DataFrame({"run": name, "step": range(steps), "loss": losses}), count


def compare(
    steps: Annotated[int, typer.Option(min=2)] = 20_000,
    kills: Annotated[int, typer.Option(help="Processes that are killed.", min=1)] = 12,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and curves.")] = Path("."),
    short: Short = False,
) -> None:
    """Train all five, and say how far their curves are apart."""
    out.mkdir(parents=True, exist_ok=True)
    if short:
        steps, kills = 12, 1
    results = {
        name: run(name, out / f"{k}.pt", steps, kills, short)
        for k, name in enumerate(track(RUNS, "training"))
    }
    curves = pd.concat([losses for losses, _ in results.values()])
    wide = curves.pivot(index="step", columns="run", values="loss")[list(RUNS)]
    blocks = wide.groupby(wide.index // BLOCK * BLOCK).mean()
    blocks.to_csv(out / "long_run.csv", float_format="%.6g")
    table = Table("run", "first block", "last block", "mean distance to torch's", "largest")
    for name in RUNS:
        others = blocks[[other for other in OF_TORCH if other != name]]
        apart = others.rdiv(blocks[name], axis=0).sub(1).abs()
        first, last = blocks[name].iloc[0], blocks[name].iloc[-1]
        mean, largest = apart.to_numpy().mean(), apart.to_numpy().max()
        table.add_row(name, f"{first:.4f}", f"{last:.4f}", f"{mean:.2%}", f"{largest:.2%}")
    console = Console()
    console.print(table)
    same = bool((wide[FUSED] == wide[KILLED]).all())
    console.print(
        f"killed {results[KILLED][1]} times, and "
        f"{'the same to the last bit' if same else 'not the same'} as the run that was not"
    )


if __name__ == "__main__":
    typer.run(compare)
