"""``results.png`` from the CSV files alone: ``python -m benchmarks.plot benchmarks/out``."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from .results import FORWARD_BACKWARD, OURS, TORCH

COLOURS = {
    ("float32", "first"): "tab:blue",
    ("float32", "last"): "tab:cyan",
    ("float32", "middle"): "tab:green",
    ("float32", "whole"): "tab:purple",
    ("bfloat16", "first"): "tab:orange",
    ("bfloat16", "last"): "tab:red",
}
KIND_TEXT = {"first": "dim 0", "last": "last dim", "middle": "middle dim", "whole": "dim None"}


def plot(folder: Path) -> Path:
    """Draw what ``folder`` holds: speed over torch and distance to the copy limit by size, and the
    models.

    Raises:
        FileNotFoundError: there is neither layers.csv nor models.csv.
    """
    frames = {
        case: pd.read_csv(folder / f"{case}.csv", dtype={"dim": str}, keep_default_na=True)
        for case in ("layers", "models")
        if (folder / f"{case}.csv").exists()
    }
    if not frames:
        raise FileNotFoundError(f"no layers.csv and no models.csv in {folder}")
    figure, axes = plt.subplots(
        1, 3, figsize=(18, 6), layout="constrained", width_ratios=(1.2, 1.2, 0.9)
    )
    if "layers" in frames:
        layers = frames["layers"].query("phase == @FORWARD_BACKWARD")
        _speed(axes[0], layers)
        _distance(axes[1], layers)
    if "models" in frames:
        _models(axes[2], frames["models"])
    for axis, drawn in zip(axes, ("layers", "layers", "models"), strict=True):
        axis.set_visible(drawn in frames)
    about = next(iter(frames.values())).iloc[0]
    figure.suptitle(
        f"wnkernel ({about.backend} backend) and torch {about.torch}: {FORWARD_BACKWARD}, "
        f"{about.device}, {about.threads} threads"
    )
    path = folder / "results.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _speed(axis: Axes, layers: pd.DataFrame) -> None:
    ours = layers[layers.contender == OURS]
    for (dtype, kind), colour in COLOURS.items():
        part = ours[(ours.dtype == dtype) & (ours.kind == kind)]
        if len(part):
            label = f"{dtype}, {KIND_TEXT[kind]}"
            axis.scatter(part.numel, part.ratio_to_torch, s=22, color=colour, label=label)
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set(xscale="log", yscale="log", xlabel="elements", ylabel="times as fast as torch")
    axis.set_title("Single weights: speed (above the line is faster)")
    axis.legend(fontsize=8)


def _distance(axis: Axes, layers: pd.DataFrame) -> None:
    for (dtype, kind), colour in COLOURS.items():
        for who, marker, filled in ((TORCH, "x", True), (OURS, "o", False)):
            part = layers[
                (layers.dtype == dtype) & (layers.kind == kind) & (layers.contender == who)
            ]
            if len(part):
                face = {} if filled else {"facecolors": "none", "edgecolors": colour}
                style = {"color": colour} if filled else face
                axis.scatter(part.numel, part.ratio_to_limit, s=22, marker=marker, **style)
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set(xscale="log", yscale="log", xlabel="elements", ylabel="time over the copy limit")
    axis.set_title("Distance to the limit (o wnkernel, x torch; 1 = an in-place copy's speed)")


def _models(axis: Axes, models: pd.DataFrame) -> None:
    ours = models[models.contender == OURS]
    table = ours.pivot(index="label", columns="phase", values="ratio_to_torch")
    table.loc[list(dict.fromkeys(ours.label))[::-1]].plot.barh(ax=axis, width=0.7)
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set(xlabel="times as fast as torch's parametrization", ylabel="")
    axis.set_title("Whole models, ungrouped")
    axis.legend(fontsize=8, title="")


if __name__ == "__main__":
    print(plot(Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/out")))
