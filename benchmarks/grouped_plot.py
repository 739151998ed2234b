"""``fused.png`` from the CSV files alone: ``python -m benchmarks.grouped_plot benchmarks/out``."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from .results import COPY, FUSED, OURS, TORCH, VERSION

COLOURS = {TORCH: "tab:red", OURS: "tab:orange", FUSED: "tab:blue", VERSION: "tab:cyan"}
COPIES = 2.5


def plot(folder: Path) -> Path:
    """Draw what ``folder`` holds: time against the number of layers, and the distance of whole
    models to the copy limit.

    Raises:
        FileNotFoundError: there is neither flat.csv nor fused.csv.
    """
    files = {case: folder / f"{case}.csv" for case in ("flat", "fused")}
    frames = {case: pd.read_csv(file) for case, file in files.items() if file.exists()}
    if not frames:
        raise FileNotFoundError(f"no flat.csv and no fused.csv in {folder}")
    figure, axes = plt.subplots(1, 2, figsize=(14, 6), layout="constrained")
    for axis, (case, draw) in zip(axes, (("flat", _flat), ("fused", _models)), strict=True):
        if case in frames:
            draw(axis, frames[case])
        axis.set_visible(case in frames)
    about = next(iter(frames.values())).iloc[0]
    figure.suptitle(
        f"wnkernel ({about.backend} backend) and torch {about.torch}: all weight norms of a model, "
        f"forward and backward, {about.device}, {about.threads} threads"
    )
    path = folder / "fused.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _flat(axis: Axes, flat: pd.DataFrame) -> None:
    flat = flat.assign(layers=flat["shape"].str.split().str[0].astype(int)).sort_values("layers")
    for who, colour in COLOURS.items():
        part = flat[flat.contender == who]
        if len(part):
            axis.plot(part.layers, part.median_ms, marker="o", color=colour, label=who)
            axis.fill_between(part.layers, part.p20_ms, part.p80_ms, color=colour, alpha=0.15)
    copies = flat[flat.contender == COPY]
    axis.plot(
        copies.layers,
        COPIES * copies.median_ms,
        linestyle="--",
        color="black",
        label=f"{COPIES} copies (the limit)",
    )
    axis.set(xlabel="layers", ylabel="ms", ylim=(0, None), xlim=(0, None))
    axis.set_title(flat.label.iloc[0])
    axis.legend()


def _models(axis: Axes, models: pd.DataFrame) -> None:
    models = models.assign(of=models.label + "\n" + models["shape"])
    table = models.pivot(index="of", columns="contender", values="ratio_to_limit")
    order = list(dict.fromkeys(models.of))[::-1]
    contenders = [who for who in COLOURS if who in table][::-1]
    colours = [COLOURS[who] for who in contenders]
    table.loc[order, contenders].plot.barh(ax=axis, width=0.8, color=colours, logx=True)
    axis.axvline(1.0, color="black", linestyle="--", linewidth=1)
    axis.set(xlabel=f"time over {COPIES} copies of v (log scale; 1 is the limit)", ylabel="")
    axis.set_title("Whole models")
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1])


if __name__ == "__main__":
    print(plot(Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/out")))
