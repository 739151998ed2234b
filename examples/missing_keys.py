"""Load a checkpoint whose weight norm has other keys than the model: the error, and the cures.

    pip install '.[examples]'
    python examples/missing_keys.py --out keys      # --short takes seconds

Weight normalisation (Salimans and Kingma, 2016, https://arxiv.org/abs/1602.07868) has been saved
under three sets of keys: `weight_g` and `weight_v` by torch.nn.utils.weight_norm ("legacy"),
`parametrizations.weight.original0` and `original1` by its successor ("parametrized"), and a plain
`weight` where it was removed ("folded"). A small vocoder is trained here for less than a minute as
an old trainer would, and its checkpoint is taken to models of all three kinds, in all three
layouts: what torch says, and how far the sound then is from the trainer's with each of wnkernel's
cures. docs/checkpoints.md has the rules.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import soundfile
import torch
import typer
from common import CONSOLE, Out, Short, done, picture, spectrogram
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from train_vocoder import ARCTIC, RATE, batches, load, log_mel, normed, plain, train

import wnkernel

State = dict[str, Tensor]
LEGACY, PARAMETRIZED, FOLDED = "legacy", "parametrized", "folded"
NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    LEGACY: nn.utils.weight_norm,
    PARAMETRIZED: nn.utils.parametrizations.weight_norm,
    FOLDED: lambda layer: layer,
}


def vocoder(layout: str, seed: int = 1) -> nn.Module:
    """A vocoder with random weights, whose keys have that layout."""
    return normed(plain(seed), NORMS[layout])


def alone(model: nn.Module, state: State) -> None:
    """What most code does."""
    model.load_state_dict(state)


def convert_the_dict(model: nn.Module, state: State) -> None:
    """The first cure, for every model: convert the checkpoint to the layout of the model."""
    keys = " ".join(model.state_dict())
    layout = LEGACY if "weight_g" in keys else PARAMETRIZED if "original0" in keys else FOLDED
    model.load_state_dict(wnkernel.convert_state_dict(state, to=layout, like=model))


def accept(model: nn.Module, state: State) -> None:
    """The second, for models that keep torch's weight norm."""
    with wnkernel.accept_any_layout(model):
        model.load_state_dict(state)


def convert_the_model(model: nn.Module, state: State) -> None:
    """The third: wnkernel's layers take every layout."""
    wnkernel.convert(model)
    model.load_state_dict(state)


CURES = {
    "convert_state_dict": convert_the_dict,
    "accept_any_layout": accept,
    "convert": convert_the_model,
}


def outcome(
    way: Callable[[nn.Module, State], None],
    layout: str,
    state: State,
    mel: Tensor,
    expected: Tensor,
) -> str:
    """How far the sound of a model that loaded is from the trainer's, or why it did not load."""
    model = vocoder(layout)
    try:
        way(model, state)
    except RuntimeError as error:
        missing = str(error).partition("Missing key(s)")[2].partition("Unexpected")[0].count('"')
        return f"{missing // 2} missing"
    with torch.no_grad():
        sound = model(mel)
    torch.testing.assert_close(sound, expected, rtol=0, atol=1e-4)
    return f"{(sound - expected).abs().max():.0e}".replace("0e+00", "same bits")


def main(out: Out = Path("."), short: Short = False) -> None:
    """Train, save, fail, and cure."""
    torch.set_num_threads(1)  # layers as small as these gain nothing by more
    warnings.simplefilter("ignore", FutureWarning)  # torch's own, of its legacy weight norm
    out.mkdir(parents=True, exist_ok=True)
    audio = load(ARCTIC)
    mel = log_mel(audio)
    trainer = vocoder(LEGACY, 0)
    data = batches(audio, 0, 2 if short else 1000, size=2)
    train(trainer, track(data, "an old trainer"), rate=1e-3)
    with torch.no_grad():
        expected = trainer(mel)
    old, new = out / "g_00001000", out / "g_folded.pt"
    torch.save({"generator": trainer.state_dict()}, old)

    state = torch.load(old)["generator"]
    damaged = vocoder(FOLDED)
    try:
        damaged.load_state_dict(state)
    except RuntimeError as error:
        for line in str(error).splitlines():
            CONSOLE.print(line.strip()[:74], "..." * (len(line) > 74), style="red", soft_wrap=True)
    damaged.load_state_dict(state, strict=False)  # takes biases, and leaves weights random

    command = ["-m", "wnkernel", "convert", str(old), str(new), "--to", FOLDED, "--force"]
    subprocess.run([sys.executable, *command], check=True)
    cured = vocoder(FOLDED)
    cured.load_state_dict(torch.load(new)["generator"])
    with torch.no_grad():
        noise, sound = damaged(mel), cured(mel)
    torch.testing.assert_close(sound, expected, rtol=0, atol=1e-4)

    table = Table("file", "model", "torch alone", "1", "2", "3", padding=0)
    table.title = "distance to the trainer's sound, or missing keys"
    table.caption = ", ".join(f"{k}: {cure}" for k, cure in enumerate(CURES, 1))
    loaded = dict.fromkeys(("torch alone", *CURES), 0)
    for given in NORMS:
        file = wnkernel.convert_state_dict(state, to=given, like=vocoder(given))
        for layout in NORMS:
            cells = [outcome(way, layout, file, mel, expected) for way in (alone, *CURES.values())]
            for way, cell in zip(loaded, cells, strict=True):
                loaded[way] += "missing" not in cell
            table.add_row(given, layout, *cells)
    CONSOLE.print(table)

    with picture(out / "missing_keys.png", 3) as axes:
        titles = ("the trainer's model", "strict=False: biases alone", "wnkernel convert")
        for each, title, heard in zip(axes, titles, (expected, noise, sound), strict=True):
            spectrogram(each, heard, title)
    soundfile.write(out / "strict_false.wav", noise.numpy(), RATE)
    soundfile.write(out / "missing_keys.wav", sound.numpy(), RATE)
    done(
        f"of 9 pairs of file and model load: {', '.join(f'{n} by {w}' for w, n in loaded.items())} "
        "(the last two are for models that have a weight norm).",
        old,
        new,
        *(out / name for name in ("missing_keys.png", "missing_keys.wav", "strict_false.wav")),
    )


if __name__ == "__main__":
    typer.run(main)
