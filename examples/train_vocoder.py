"""Train a small vocoder on real speech with three weight norms, and compare the loss curves.

    pip install '.[examples]'
    python examples/train_vocoder.py --out curves       # --short takes seconds

A HiFi-GAN generator (transformers' SpeechT5HifiGan) turns a log-mel spectrogram with 80 channels
into 16 kHz audio. It learns one sentence of CMU ARCTIC, or a recording given with --audio. The loss
is the distance of log spectra at three resolutions. Each seed is trained four times: with torch's
weight norm, with wnkernel's, with wnkernel's fused, and, as a yardstick, with torch's again but
with every g moved to the next float32 number at the start. Training is chaotic, and rounding errors
grow from step to step. So a weight norm that equals torch's up to rounding drifts away from torch's
curve as the yardstick does. The curves in results/ were made with --seeds 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import pandas as pd
import soundfile
import torch
import typer
from common import Short, done
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig
from transformers.audio_utils import mel_filter_bank

import wnkernel

ARCTIC = Path(__file__).parent / "audio" / "arctic_a0007.wav"
RATE = 16_000
HOP = 256
MELS = 80
SEGMENT = 32
"""The spectrogram frames of a training example: half a second."""
BATCH = 4
LEARNING_RATE = 2e-4
RESOLUTIONS = (256, 512, 1024)
"""The window lengths of the spectra in the loss, in samples."""

TORCH, OURS, FUSED, YARDSTICK = "torch", "wnkernel", "wnkernel, fused", "torch, one rounding apart"


def plain(seed: int) -> SpeechT5HifiGan:
    """Make the vocoder without weight norm."""
    torch.manual_seed(seed)
    config = SpeechT5HifiGanConfig(
        model_in_dim=MELS,
        upsample_initial_channel=64,
        upsample_rates=[8, 8, 4],
        upsample_kernel_sizes=[16, 16, 8],
        resblock_kernel_sizes=[3, 7],
        resblock_dilation_sizes=[[1, 3], [1, 3]],
        normalize_before=False,
    )
    return SpeechT5HifiGan(config)


def normed(model: nn.Module, norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Put a weight norm on every convolution of a model, and return the model."""
    for module in list(model.modules()):
        if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
            norm(module)
    return model


def generator(kind: str, seed: int) -> nn.Module:
    """Make the vocoder with one kind of weight norm."""
    of_torch = kind in (TORCH, YARDSTICK)
    norm = nn.utils.parametrizations.weight_norm if of_torch else wnkernel.weight_norm
    model = normed(plain(seed), norm)
    if kind == FUSED:
        wnkernel.fuse(model)
    if kind == YARDSTICK:
        move_g(model, torch.inf)
    return model


def move_g(model: nn.Module, towards: float) -> None:
    """Move every g of a model to the next float32 number in one direction."""
    for key, parameter in model.named_parameters():
        if key.endswith("original0"):
            parameter.data.copy_(torch.nextafter(parameter.data, torch.tensor(towards)))


def load(path: Path) -> Tensor:
    """Read a recording as one channel of float32 samples.

    Raises:
        typer.BadParameter: if the recording has another sampling rate or is too short.
    """
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    if rate != RATE:
        raise typer.BadParameter(f"expected {RATE} samples per second, got {rate} in {path}")
    if len(samples) < (SEGMENT + 1) * HOP:
        raise typer.BadParameter(f"expected at least half a second of audio, got {path}")
    return torch.from_numpy(samples.mean(axis=1))


def spectrum(audio: Tensor, window: int, hop: int) -> Tensor:
    """Return the log magnitudes ``[..., frequency, frame]`` of the spectrum."""
    frames = torch.stft(audio, window, hop, window=torch.hann_window(window), return_complex=True)
    return frames.abs().clamp_min(1e-5).log()


def log_mel(audio: Tensor) -> Tensor:
    """Return the log-mel spectrogram ``[frame, mel]``, with one frame for every HOP samples."""
    filters = mel_filter_bank(513, MELS, 0.0, RATE / 2, RATE, norm="slaney", mel_scale="slaney")
    mel = torch.from_numpy(filters).float().T @ spectrum(audio, 1024, HOP).exp()
    return mel.clamp_min(1e-5).log().T


def cut(audio: Tensor, mel: Tensor, starts: Sequence[int], frames: int) -> tuple[Tensor, Tensor]:
    """Cut training examples from a recording and its :func:`log_mel`.

    Args:
        audio: the recording.
        mel: the log-mel spectrogram of the recording.
        starts: the first frame of each example.
        frames: the frames of each example.

    Returns:
        Spectrograms ``[len(starts), frames, mel]`` and audio ``[len(starts), sample]``.
    """
    mels = torch.stack([mel[k : k + frames] for k in starts])
    return mels, torch.stack([audio[k * HOP : (k + frames) * HOP] for k in starts])


def batches(audio: Tensor, seed: int, steps: int, size: int = BATCH) -> list[tuple[Tensor, Tensor]]:
    """Return ``(spectrogram, audio)`` of random segments for every step."""
    mel = log_mel(audio)
    random = torch.Generator().manual_seed(seed)
    last = len(audio) // HOP - SEGMENT
    starts = [torch.randint(last, (size,), generator=random).tolist() for _ in range(steps)]
    return [cut(audio, mel, chosen, SEGMENT) for chosen in starts]


def distance(made: Tensor, real: Tensor) -> Tensor:
    """Return the mean absolute difference of the log spectra at all resolutions."""
    return torch.stack(
        [(spectrum(made, n, n // 4) - spectrum(real, n, n // 4)).abs().mean() for n in RESOLUTIONS]
    ).mean()


def train(
    model: nn.Module, data: Iterable[tuple[Tensor, Tensor]], rate: float = LEARNING_RATE
) -> list[float]:
    """Take a training step for each batch, and return the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.8, 0.99))
    losses = []
    for mel, audio in data:
        loss = distance(model(mel), audio)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def plot(curves: pd.DataFrame, path: Path) -> None:
    """Plot the loss curves, and below them their relative distance to torch's curve."""
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (upper, lower) = plt.subplots(2, sharex=True, figsize=(7, 7), layout="constrained")
    first = curves[curves.seed == curves.seed.min()].pivot(
        index="step", columns="kind", values="loss"
    )
    for kind, style in ((TORCH, "-"), (OURS, "--"), (FUSED, ":")):
        upper.plot(first[kind], style, label=kind)
    wide = curves.pivot(index=["seed", "step"], columns="kind", values="loss")
    for kind, color in ((YARDSTICK, "0.6"), (OURS, "C1"), (FUSED, "C2")):
        apart = (wide[kind] / wide[TORCH] - 1).abs().groupby("step").max()
        lower.semilogy(apart.clip(lower=1e-9), color=color, label=kind)
    upper.set_ylabel("loss, first seed")
    lower.set_ylabel("relative distance to torch, largest of all seeds")
    lower.set_xlabel("step")
    upper.legend()
    lower.legend()
    figure.savefig(path, dpi=120)


def main(
    audio: Annotated[Path, typer.Option(exists=True, dir_okay=False)] = ARCTIC,
    steps: Annotated[int, typer.Option(min=2)] = 150,
    seeds: Annotated[int, typer.Option(min=1)] = 1,
    out: Annotated[Path, typer.Option(help="Folder for losses.csv and losses.png.")] = Path("."),
    short: Short = False,
) -> None:
    """Train, and print how far the loss curves are apart."""
    samples = load(audio)
    out.mkdir(parents=True, exist_ok=True)
    if short:
        steps, seeds = 2, 1
    runs = [(seed, kind) for seed in range(seeds) for kind in (TORCH, OURS, FUSED, YARDSTICK)]
    rows = []
    for seed, kind in track(runs, "training"):
        losses = train(generator(kind, seed), batches(samples, seed, steps))
        rows += [(seed, kind, step, loss) for step, loss in enumerate(losses)]
    curves = pd.DataFrame(rows, columns=["seed", "kind", "step", "loss"])
    curves.to_csv(out / "losses.csv", index=False)
    plot(curves, out / "losses.png")

    table = Table("seed", "kind", "first loss", "last loss", "largest distance to torch")
    wide = curves.pivot(index=["seed", "step"], columns="kind", values="loss")
    for seed, kind in runs:
        mine, of_torch = wide.loc[seed, kind].to_numpy(), wide.loc[seed, TORCH].to_numpy()
        apart = np.abs(mine / of_torch - 1).max()
        table.add_row(str(seed), kind, f"{mine[0]:.4f}", f"{mine[-1]:.4f}", f"{apart:.1e}")
    Console().print(table)
    same = (wide[OURS] == wide[FUSED]).all()
    done(
        f"fused and not fused: {'the same to the last bit' if same else 'different'}.",
        out / "losses.csv",
        out / "losses.png",
    )


if __name__ == "__main__":
    typer.run(main)
