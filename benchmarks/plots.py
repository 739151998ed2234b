"""``fused.png``: time by the number of layers, and the distance of whole models to the limit."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import pandas as pd

from .contenders import COPY, FUSED, OURS, TORCH, VERSION

COLOURS = {TORCH: "tab:red", OURS: "tab:orange", FUSED: "tab:blue", VERSION: "tab:cyan"}
COPIES = 2.5


def plot(folder: Path) -> Path:
    """Draw what flat.csv and fused.csv have, one of which has to be there."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    files = {draw: folder / f"{name}.csv" for name, draw in (("flat", _flat), ("fused", _fused))}
    frames = {draw: pd.read_csv(file) for draw, file in files.items() if file.exists()}
    size = (7 * len(frames), 6)
    figure, axes = plt.subplots(1, len(frames), figsize=size, layout="constrained", squeeze=False)
    for axis, (draw, frame) in zip(axes[0], frames.items(), strict=True):
        draw(axis, frame)
    r = frame.iloc[0]
    figure.suptitle(
        f"wnkernel ({r.backend} backend) and torch {r.torch}: all weight norms of a model, "
        f"forward and backward, {r.device}, {r.threads} threads"
    )
    path = folder / "fused.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _flat(axis: mpl.axes.Axes, flat: pd.DataFrame) -> None:
    flat = flat.assign(layers=flat["shape"].str.split().str[0].astype(int)).sort_values("layers")
    for who, colour in COLOURS.items():
        part = flat[flat.contender == who]
        axis.plot(part.layers, part.median_ms, marker="o", color=colour, label=who)
        axis.fill_between(part.layers, part.p20_ms, part.p80_ms, color=colour, alpha=0.15)
    copies, limit = flat[flat.contender == COPY], f"{COPIES} copies (the limit)"
    axis.plot(copies.layers, COPIES * copies.median_ms, "--", color="black", label=limit)
    axis.set(xlabel="layers", ylabel="ms", ylim=(0, None), xlim=(0, None), title=flat.label.iloc[0])
    axis.legend()


def _fused(axis: mpl.axes.Axes, models: pd.DataFrame) -> None:
    models = models.assign(of=models.label + "\n" + models["shape"])
    table = models.pivot(index="of", columns="contender", values="ratio_to_limit")
    names = list(COLOURS)[::-1]
    colours = [COLOURS[who] for who in names]
    table.loc[models.of.unique()[::-1], names].plot.barh(
        ax=axis, width=0.8, color=colours, logx=True
    )
    axis.axvline(1.0, color="black", linestyle="--", linewidth=1)
    axis.set(xlabel=f"time over {COPIES} copies of v (log scale; 1 is the limit)", ylabel="")
    axis.set_title("Whole models")
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1])
