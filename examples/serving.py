"""Serve a vocoder chunk by chunk, and count what its weights cost before and after fold.

    pip install '.[examples]'
    python examples/serving.py --out serving    # --short takes seconds

A vocoder that speaks while a text is still being written is called for every eighth of a second of
sound, and computes w = g * v / ||v|| of all its layers each time. fuse computes them in one launch
a call, which is made for training and can lose here, where layers are small; fuse(reuse="version")
only when a parameter has changed; fold leaves plain layers, which is best where nothing is trained
any more. The vocoder is HiFi-GAN (Kong, Kim and Bae, "HiFi-GAN: Generative Adversarial Networks
for Efficient and High Fidelity Speech Synthesis", 2020, https://arxiv.org/abs/2010.05646), made
small and trained here for less than a minute on one sentence. docs/recipes.md has more on serving.
"""

from __future__ import annotations

import copy
import time
from functools import partial
from pathlib import Path
from statistics import median

import soundfile
import torch
import typer
from common import CONSOLE, Out, Short, done, picture, spectrogram
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from train_vocoder import (
    ARCTIC,
    FUSED,
    HOP,
    OURS,
    RATE,
    TORCH,
    batches,
    generator,
    load,
    log_mel,
    train,
)

import wnkernel

CHUNK, CONTEXT = 8, 8
"""Frames of a chunk, and frames before and after it that the vocoder also sees."""


def contenders(state: dict[str, Tensor]) -> dict[str, nn.Module]:
    """The same vocoder in five ways."""
    theirs, ours = (generator(kind, 0) for kind in (TORCH, OURS))
    theirs.load_state_dict(state)
    ours.load_state_dict(state)
    models = {"torch": theirs, "wnkernel": ours}
    for name, change in {
        "fuse": wnkernel.fuse,
        'fuse(reuse="version")': partial(wnkernel.fuse, reuse="version"),
        "fold": wnkernel.fold,
    }.items():
        models[name] = copy.deepcopy(ours)
        change(models[name])
    return models


def speak(model: nn.Module, mel: Tensor, start: int) -> Tensor:
    """The sound of the chunk that begins at a frame."""
    before = min(start, CONTEXT)
    sound = model(mel[start - before : start + CHUNK + CONTEXT])
    return sound[before * HOP : (before + CHUNK) * HOP]


def launches(model: nn.Module, mel: Tensor) -> int:
    """How many kernels are launched for the weights of a chunk, when others came before."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        speak(model, mel, CHUNK)
    names = [event.name for event in profiler.events()]
    return sum(n == "aten::_weight_norm_interface" or n.startswith("wnkernel::") for n in names)


def main(out: Out = Path("."), short: Short = False) -> None:
    """Train a little, serve the sentence in five ways, and compare."""
    torch.set_num_threads(1)  # layers as small as these gain nothing by more
    audio = load(ARCTIC)
    vocoder = generator(FUSED, 0)
    data = batches(audio, 0, 2 if short else 1000, size=2)
    train(vocoder, track(data, "training"), rate=1e-3)
    models = contenders(vocoder.state_dict())
    mel = log_mel(audio)
    starts = range(0, len(mel), CHUNK)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    sounds: dict[str, list[Tensor]] = {name: [] for name in models}
    with torch.inference_mode():
        counts = {name: (speak(m, mel, 0), launches(m, mel))[1] for name, m in models.items()}
        for start in track([*starts] * (1 if short else 10), "serving"):
            for name, model in models.items():  # by turns, so that all meet the same machine
                begun = time.process_time()
                sound = speak(model, mel, start)
                seconds[name].append(time.process_time() - begun)
                sounds[name].append(sound)

    spoken = {name: torch.cat(chunks[: len(starts)]) for name, chunks in sounds.items()}
    times = {name: median(values) * 1e3 for name, values in seconds.items()}
    table = Table("a chunk of 128 ms", "launches", "ms of CPU", "sound, from wnkernel's")
    for name in models:
        apart = (spoken[name] - spoken["wnkernel"]).abs().max().item()
        distance = f"{apart:.1e} apart" if apart else "the same bits"
        table.add_row(name, str(counts[name]), f"{times[name]:.2f}", distance)
    CONSOLE.print(table)

    with picture(out / "serving.png", 2) as (left, right):
        bars = left.barh(list(models), times.values(), color=["0.8", *["#9ecae1"] * 4])
        left.bar_label(
            bars, [f"{n} launch{'es' * (n != 1)}" for n in counts.values()], label_type="center"
        )
        left.invert_yaxis()
        left.set(
            xlabel="ms of CPU a chunk of 128 ms, median", title="a vocoder called chunk by chunk"
        )
        spectrogram(right, spoken["fold"], "what was served")
    soundfile.write(out / "serving.wav", spoken["fold"].numpy(), RATE)
    before, after = counts["wnkernel"], counts["fold"]
    done(
        f"{before} launches a chunk before fold and {after} after it, "
        f"{times['wnkernel']:.2f} ms and {times['fold']:.2f} ms (torch: {times['torch']:.2f} ms).",
        out / "serving.png",
        out / "serving.wav",
    )


if __name__ == "__main__":
    typer.run(main)
