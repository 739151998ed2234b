"""Convert a model of transformers, fine-tune it for a few steps, save it and load it again.

    pip install '.[examples]'
    python examples/finetune_transformers.py --out finetuned        # --short takes seconds

EnCodec (Défossez, Copet, Synnaeve and Adi, "High Fidelity Neural Audio Compression", 2022,
https://arxiv.org/abs/2210.13438) is an autoencoder for sound with a weight norm on every
convolution. This one is small, and starts from random weights, so nothing is downloaded; with
EncodecModel.from_pretrained("facebook/encodec_24khz") the lines are the same. It learns to copy one
sentence of speech, past its quantiser, twice: with torch's weight norm, as transformers builds it,
and with wnkernel's, fused. Loss curves agree up to rounding, which training makes larger.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from statistics import median

import soundfile
import torch
import typer
from common import CONSOLE, Out, Short, done, picture, smooth, spectrogram
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from train_vocoder import ARCTIC, RATE, distance, load
from transformers import EncodecConfig, EncodecModel

import wnkernel

BATCH, SEGMENT = 4, 4096
"""Pieces of a training step, and samples in each: a quarter of a second."""
TORCH, FUSED = "torch", "wnkernel, fused"


def small_encodec() -> EncodecModel:
    """With torch's weight norm, which its constructor applies."""
    torch.manual_seed(0)
    config = EncodecConfig(
        sampling_rate=RATE,
        num_filters=16,
        upsampling_ratios=[4, 4, 2],
        hidden_size=32,
        codebook_size=64,
        num_lstm_layers=1,
    )
    return EncodecModel(config)


def copied(model: nn.Module, audio: Tensor) -> Tensor:
    """What the model makes of ``[piece, sample]``, without its quantiser."""
    return model.decoder(model.encoder(audio[:, None]))[:, 0, : audio.shape[1]]


def main(out: Out = Path("."), short: Short = False) -> None:
    """Fine-tune with torch's weight norm and with wnkernel's; save, load, compare."""
    torch.set_num_threads(1)  # layers as small as these gain nothing by more
    audio = load(ARCTIC)
    theirs = small_encodec()
    model = copy.deepcopy(theirs)
    converted = wnkernel.convert(model)  # in place; parameters and their names stay
    wnkernel.fuse(model)
    CONSOLE.print(f"{len(converted)} weight norms of {type(model).__name__} were converted")

    models = {TORCH: theirs, FUSED: model}
    optimizers = {kind: torch.optim.AdamW(m.parameters(), 2e-3) for kind, m in models.items()}
    losses: dict[str, list[float]] = {kind: [] for kind in models}
    seconds: dict[str, list[float]] = {kind: [] for kind in models}
    random = torch.Generator().manual_seed(0)
    for _ in track(range(4 if short else 300), "fine-tuning"):
        starts = torch.randint(len(audio) - SEGMENT, (BATCH,), generator=random).tolist()
        pieces = torch.stack([audio[k : k + SEGMENT] for k in starts])
        for kind, each in models.items():
            begun = time.process_time()
            made = copied(each, pieces)
            loss = 0.3 * distance(made, pieces) + 100 * F.l1_loss(made, pieces)
            loss.backward()
            optimizers[kind].step()
            optimizers[kind].zero_grad()
            seconds[kind].append(time.process_time() - begun)
            losses[kind].append(loss.item())

    folder = out / "encodec"
    model.save_pretrained(folder)  # under the names of torch's parametrization
    again = EncodecModel.from_pretrained(folder)  # with torch's weight norm, as for anybody
    with torch.no_grad():
        sound = copied(model.eval(), audio[None])[0]
        as_theirs = copied(again, audio[None])[0]
        wnkernel.convert(again)
        as_ours = copied(again, audio[None])[0]
    torch.testing.assert_close(as_theirs, sound)
    if not torch.equal(as_ours, sound):
        raise SystemExit("the model that was loaded and converted gives another sound")

    table = Table("weight norm", "first loss", "last losses", "ms of CPU a step")
    for kind, values in losses.items():
        ms = f"{median(seconds[kind]) * 1e3:.1f}"
        table.add_row(kind, f"{values[0]:.6f}", f"{smooth(values)[-1]:.4f}", ms)
    CONSOLE.print(table)

    with picture(out / "finetune_transformers.png", 3) as (left, middle, right):
        for (kind, values), style in zip(losses.items(), ("-", "--"), strict=True):
            left.semilogy(smooth(values), style, label=kind)
        left.set(xlabel="step", ylabel="loss, mean of 20 steps", title="fine-tuning EnCodec")
        left.legend()
        spectrogram(middle, audio, "the recording")
        spectrogram(right, sound, "its copy")
    soundfile.write(out / "finetune_transformers.wav", sound.numpy(), RATE)
    done(
        "saved and loaded, the model gives the same sound with torch's weight norm up to "
        f"{(as_theirs - sound).abs().max():.0e}, and converted to the last bit.",
        folder,
        out / "finetune_transformers.png",
        out / "finetune_transformers.wav",
    )


if __name__ == "__main__":
    typer.run(main)
