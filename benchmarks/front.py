"""``python -m benchmarks.front FOLDER``: the table and the picture of README.md, from the CSV files
of a run. What lost stands in the table beside what won."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from .contenders import COMPILED, FUSED, LEGACY, OURS, TORCH
from .report import COLOURS
from .results import ALONE, FORWARD_BACKWARD, GAN_STEP, geometric_mean

SHOWN = {  # Models of the table, by their labels in the CSV files.
    "HiFi-GAN-V1": "HiFi-GAN V1",
    "HiFi-GAN-MPD": "HiFi-GAN's multi-period discriminator",
    "DAC": "DAC",
    "ParallelWaveGAN": "ParallelWaveGAN",
}
WHAT = "all weights of a model, forward and backward, float32"
HEADS = (WHAT, "torch", "wnkernel", "times as fast")


def _row(what: str, torch_ms: float, ours_ms: float) -> tuple[str, ...]:
    times = (f"{ms:.0f} ms" if ms >= 100 else f"{ms:#.3g} ms" for ms in (torch_ms, ours_ms))
    ratio = torch_ms / ours_ms
    return what, *times, f"**{ratio:.2f}**" if ratio < 1 else f"{ratio:.1f}"


def _name(label: str) -> str:
    """What a model is called: its label may end with the number of threads."""
    model, *threads = label.split(", ")
    return ", ".join([SHOWN.get(model, model), *threads])


def table(folder: Path) -> Iterator[tuple[str, ...]]:
    """The rows of the table."""
    fused = pd.read_csv(folder / "fused.csv").pivot(
        index=["label", "shape"], columns="contender", values="median_ms"
    )
    times = fused.reset_index("shape")
    for label, name in SHOWN.items():
        m = times.loc[label]
        yield _row(f"{name}, {m['shape']}, fused", m[TORCH], m[FUSED])
    worst = (times[TORCH] / times[OURS]).idxmin()
    m = times.loc[worst]
    what = f"{_name(worst)}, not fused: the least gain of {len(times)} models"
    yield _row(what, m[TORCH], m[OURS])

    compiled = pd.read_csv(folder / "compile.csv")
    of = compiled[compiled.phase == ALONE].pivot(
        index="label", columns="contender", values="median_ms"
    )
    best = of[[TORCH, TORCH + COMPILED, LEGACY]].min(axis=1)
    worst = (best / of[FUSED + COMPILED]).idxmin()
    what = f"{_name(worst)}, fused and compiled, against torch's fastest: the worst of {len(of)}"
    yield _row(what, best[worst], of.loc[worst, FUSED + COMPILED])

    layers = pd.read_csv(folder / "layers.csv")
    ours = layers[(layers.contender == OURS) & (layers.phase == FORWARD_BACKWARD)]
    ratio = ours[(ours["dtype"] == "float32") & ours.kind.isin(("first", "last"))].ratio_to_torch
    slower = f"**{(ratio < 1).sum()} are slower**, by up to {100 * (1 - ratio.min()):.0f} %"
    mean = f"{geometric_mean(ratio):.2f}; {slower}"
    yield f"one weight alone, {len(ratio)} shapes, first and last dim", "", "", mean

    gan = pd.read_csv(folder / "gan.csv")
    gan = gan[gan.phase == GAN_STEP].set_index("contender")
    what = "a whole GAN training step, fused, with tiny batches"
    yield _row(what, gan.median_ms[TORCH], gan.median_ms[FUSED])


def markdown(folder: Path) -> str:
    """The table in Markdown."""
    lines = (HEADS, ("---",) * len(HEADS), *table(folder))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def picture(folder: Path, out: Path) -> None:
    """Bars of all models: torch, one by one, fused."""
    from matplotlib.figure import Figure

    fused = pd.read_csv(folder / "fused.csv")
    names = {TORCH: "torch", OURS: "wnkernel", FUSED: "wnkernel, fused"}
    of = fused.assign(model=fused.label + ", " + fused["shape"])
    times = of.pivot(index="model", columns="contender", values="median_ms")
    times = times.loc[of.model.unique()[::-1], list(names)[::-1]]
    axis = Figure((9, 5.5)).subplots()
    times.plot.barh(ax=axis, color=[COLOURS[who] for who in times], width=0.8)
    for bars, who in zip(axis.containers, times, strict=True):
        ratio = (times[TORCH] / times[who]).map("  {:.1f} x".format) if who != TORCH else None
        labels = ratio if ratio is not None else times[who].map("  {:.0f} ms".format)
        axis.bar_label(bars, labels=list(labels), fontsize=7)
    handles, _ = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], list(names.values()), loc="lower right")
    r = fused.iloc[0]
    axis.set(ylabel="", xlabel="ms; x: times as fast as torch", xlim=(0, 1.1 * times.max().max()))
    axis.set_title("All weight norms of a model, forward and backward", loc="left")
    axis.figure.text(0.99, 0.01, f"{r.device}, {r.threads} threads, {r.commit}", ha="right", size=7)
    axis.spines[["top", "right"]].set_visible(False)
    axis.figure.tight_layout()
    axis.figure.savefig(out, dpi=110)


def main(
    folder: Annotated[Path, typer.Argument(help="With the CSV files of `make bench`.")],
) -> None:
    """Print the table in Markdown, and draw front.png into the folder."""
    print(markdown(folder))
    picture(folder, folder / "front.png")


if __name__ == "__main__":
    typer.run(main)
