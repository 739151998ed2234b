"""What the examples share: the options of their commands, pictures, and the line at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import typer
from PIL import Image
from rich.console import Console
from torch import Tensor

CONSOLE = Console()

Out = Annotated[Path, typer.Option(help="Folder for pictures and sounds. It is made if need be.")]
Short = Annotated[bool, typer.Option("--short", help="Take seconds, to see that it runs.")]


@contextmanager
def picture(path: Path, columns: int) -> Iterator[Sequence[Any]]:
    """Matplotlib's axes side by side, which become a small PNG when the block ends."""
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    size = {"figsize": (10, 3.6), "layout": "constrained"}
    figure, axes = plt.subplots(1, columns, squeeze=False, **size)
    yield axes[0]
    figure.savefig(path, dpi=80)
    plt.close(figure)
    few_colours = Image.open(path).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    few_colours.save(path, optimize=True)


def spectrogram(axes: Any, audio: Tensor, title: str) -> None:
    """Draw the spectrogram of 16 kHz audio, in decibels."""
    axes.specgram(audio.numpy() + 1e-6, NFFT=512, Fs=16_000, noverlap=384, vmin=-120, vmax=-30)
    axes.set(title=title, xlabel="s", ylabel="Hz")


def smooth(losses: Sequence[float], steps: int = 20) -> np.ndarray:
    """Means of the last ``steps`` losses, or of as many as there are."""
    sums = np.cumsum([0.0, *losses])
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(ends - steps, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def done(shown: str, *files: Path) -> None:
    """Print what an example has shown, and where its files are."""
    CONSOLE.print(f"[bold]Shown:[/] {shown}", highlight=False)
    for file in files:
        CONSOLE.print(f"  {file}", highlight=False, soft_wrap=True)
