"""Train the vocoder of train_vocoder.py with norms of v that grow, and with norms that are kept.

    pip install '.[examples]'
    python examples/drift.py --out drift       # --short takes seconds

The gradient of v is orthogonal to v, so steps make v longer, and the same learning rate turns it
less and less. w = g v / ||v|| does not depend on the length of v. So wnkernel.normalize_after_step
can give v its first norm back after each step: w stays what it is, and steps keep their size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from common import CONSOLE, Out, Short, done, picture, smooth
from rich.progress import track
from torch import Tensor, nn
from torch.nn.utils import parametrize
from train_vocoder import ARCTIC, FUSED, HOP, LEARNING_RATE, cut, distance, generator, load, log_mel

import wnkernel

FREE, KEPT = "free", "kept"
SEGMENT, BATCH = 16, 2
SEED = 0


def train(kind: str, steps: int) -> pd.DataFrame:
    """Train with one kind of norms. Return for each step the loss, how much longer the rows of v
    are than at the beginning, and by which angle the step turned them, in degrees; both are means
    over all rows."""
    audio = load(ARCTIC)
    mel = log_mel(audio)
    model = generator(FUSED, SEED)
    v = [p for key, p in model.named_parameters() if key.endswith("original1")]
    first = [norms(t) for t in v]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.8, 0.99))
    if kind == KEPT:
        wnkernel.normalize_after_step(v, norm="keep")
    random = torch.Generator().manual_seed(SEED)
    rows = []
    for _ in track(range(steps), kind):
        starts = torch.randint(len(audio) // HOP - SEGMENT, (BATCH,), generator=random).tolist()
        mels, real = cut(audio, mel, starts, SEGMENT)
        before = [t.detach().clone() for t in v]
        loss = distance(model(mels), real)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        growth = torch.cat([norms(t) / n for t, n in zip(v, first, strict=True)]).mean()
        turned = torch.cat([angles(t, old) for t, old in zip(v, before, strict=True)]).mean()
        rows.append((kind, loss.item(), growth.item(), turned.item()))
    return pd.DataFrame(rows, columns=["norms", "loss", "growth", "angle"])


def norms(t: Tensor) -> Tensor:
    """The norms of the rows of a tensor."""
    return t.detach().flatten(1).norm(dim=1)


def angles(new: Tensor, old: Tensor) -> Tensor:
    """The angle between each row of one tensor and that of another, in degrees."""
    a, b = (nn.functional.normalize(t.detach().double().flatten(1)) for t in (new, old))
    return torch.rad2deg(2 * torch.asin(((a - b).norm(dim=1) / 2).clamp(max=1)))


def change_of_w(model: nn.Module) -> float:
    """Give every v of a model another norm, and return the largest change of an element of its w,
    in units of the last place of the largest element of its row."""
    layers = [m for m in model.modules() if parametrize.is_parametrized(m, "weight")]
    worst = 0.0
    for layer in layers:
        w = layer.weight.detach().clone()
        with torch.no_grad():
            wnkernel.normalize_(layer.parametrizations.weight.original1, norm=1.0)
        exponent = torch.frexp(w.flatten(1).abs().amax(1)).exponent - 1
        unit = torch.finfo(w.dtype).eps * 2.0**exponent
        change = (layer.weight.detach() - w).flatten(1).abs().amax(1) / unit
        worst = max(worst, change.max().item())
    return worst


def compare(
    steps: Annotated[int, typer.Option(min=2)] = 2000, out: Out = Path("."), short: Short = False
) -> None:
    """Train both, and draw what becomes of v."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    results = [train(kind, 6 if short else steps) for kind in (FREE, KEPT)]
    with picture(out / "drift.png", 3) as (growth, angle, loss):
        for result in results:
            (kind,) = result["norms"].unique()
            growth.plot(result["growth"], label=f"norm of v {kind}")
            angle.plot(smooth(result["angle"]), label=f"norm of v {kind}")
            loss.plot(smooth(result["loss"], 100), label=f"norm of v {kind}")
        growth.set(title="norm of v, beginning = 1", xlabel="step")
        angle.set(title="degrees that a step turns v", xlabel="step")
        loss.set(title="loss", xlabel="step", yscale="log")
        for axes in (growth, angle, loss):
            axes.legend()
    free, kept = (
        result.tail(max(1, len(result) // 20)).mean(numeric_only=True) for result in results
    )
    CONSOLE.print(
        f"norm of v: {free.growth:.4f} times the first if free, {kept.growth:.6f} if kept; "
        f"a step turns v by {free.angle:.3f} and {kept.angle:.3f} degrees; "
        f"loss {free.loss:.3f} and {kept.loss:.3f}",
        highlight=False,
    )
    worst = change_of_w(generator(FUSED, SEED))
    done(
        f"another norm of v changes w by rounding only, {worst:.1f} units in the last place",
        out / "drift.png",
    )


if __name__ == "__main__":
    typer.run(compare)
