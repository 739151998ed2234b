"""The plots of a folder of CSV files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import pandas as pd

from .contenders import COPY, FUSED, OURS, TORCH, VERSION
from .report import COPIES, KIND_TEXT
from .results import FORWARD_BACKWARD

Draw = Callable[["mpl.axes.Axes", pd.DataFrame], None]
COLOURS = {
    ("float32", "first"): "tab:blue",
    ("float32", "last"): "tab:cyan",
    ("float32", "middle"): "tab:green",
    ("float32", "whole"): "tab:purple",
    ("bfloat16", "first"): "tab:orange",
    ("bfloat16", "last"): "tab:red",
}
OF_MODELS = {TORCH: "tab:red", OURS: "tab:orange", FUSED: "tab:blue", VERSION: "tab:cyan"}


def plots(folder: Path, measured: Collection[str]) -> list[Path]:
    """Draw what the CSV files of a folder hold, if anything of it was just measured.

    ``results.png``: speed and distance to the copy limit of single weights by size, and models one
    by one. ``fused.png``: time against the number of layers, and the distance of whole models to
    the copy limit.
    """
    drawn = {
        "results.png": {"layers": (_speed, _distance), "models": (_models,)},
        "fused.png": {"flat": (_flat,), "fused": (_fused,)},
    }
    return [
        _plot(folder / name, cases)
        for name, cases in drawn.items()
        if not cases.keys().isdisjoint(measured)
    ]


def _plot(path: Path, cases: Mapping[str, Sequence[Draw]]) -> Path:
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    files = {case: path.with_name(f"{case}.csv") for case in cases}
    frames = {case: pd.read_csv(f, dtype={"dim": str}) for case, f in files.items() if f.exists()}
    draw = [(d, frames[case]) for case in frames for d in cases[case]]
    size = (6 * len(draw), 6)
    figure, axes = plt.subplots(1, len(draw), figsize=size, layout="constrained", squeeze=False)
    for axis, (d, frame) in zip(axes[0], draw, strict=True):
        d(axis, frame)
    r = draw[0][1].iloc[0]
    figure.suptitle(
        f"wnkernel ({r.backend} backend) and torch {r.torch}: {FORWARD_BACKWARD}, {r.device}, "
        f"{r.threads} threads"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _speed(axis: mpl.axes.Axes, layers: pd.DataFrame) -> None:
    _scatter(axis, layers, OURS, "ratio_to_torch", marker="o")
    axis.set(ylabel="times as fast as torch", title="Single weights (above the line is faster)")
    axis.legend(fontsize=8)


def _distance(axis: mpl.axes.Axes, layers: pd.DataFrame) -> None:
    _scatter(axis, layers, TORCH, "ratio_to_limit", marker="x")
    _scatter(axis, layers, OURS, "ratio_to_limit", marker="$\\circ$")
    title = "Distance to the limit (o wnkernel, x torch; 1 = an in-place copy's speed)"
    axis.set(ylabel="time over the copy limit", title=title)


def _scatter(axis: mpl.axes.Axes, layers: pd.DataFrame, who: str, y: str, marker: str) -> None:
    chosen = layers[(layers.phase == FORWARD_BACKWARD) & (layers.contender == who)]
    for (dtype, kind), part in chosen.groupby(["dtype", "kind"]):
        label, colour = f"{dtype}, {KIND_TEXT[kind]}", COLOURS[dtype, kind]
        axis.scatter(part.numel, part[y], s=22, marker=marker, color=colour, label=label)
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set(xscale="log", yscale="log", xlabel="elements")


def _models(axis: mpl.axes.Axes, models: pd.DataFrame) -> None:
    ours = models[models.contender == OURS]
    table = ours.pivot(index="label", columns="phase", values="ratio_to_torch")
    table.loc[ours.label.unique()[::-1]].plot.barh(ax=axis, width=0.7)
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set(xlabel="times as fast as torch's parametrization", ylabel="")
    axis.set_title("Whole models, ungrouped")
    axis.legend(fontsize=8, title="")


def _flat(axis: mpl.axes.Axes, flat: pd.DataFrame) -> None:
    flat = flat.assign(layers=flat["shape"].str.split().str[0].astype(int)).sort_values("layers")
    for who, colour in OF_MODELS.items():
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
    names = list(OF_MODELS)[::-1]
    colours = [OF_MODELS[who] for who in names]
    table.loc[models.of.unique()[::-1], names].plot.barh(
        ax=axis, width=0.8, color=colours, logx=True
    )
    axis.axvline(1.0, color="black", linestyle="--", linewidth=1)
    axis.set(xlabel=f"time over {COPIES} copies of v (log scale; 1 is the limit)", ylabel="")
    axis.set_title("Whole models")
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1])
