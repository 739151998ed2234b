"""HiFi-GAN as plain modules: a generator of the size of SpeechT5HifiGan, and both discriminators.

The layers are those of shapes.csv (SpeechT5HifiGan, HiFi-GAN-MPD, HiFi-GAN-MSD). The first scale
discriminator has spectral norm, as in the paper, so its layers are not weight-normed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

MEL_BANDS = 80
UPSAMPLING = 256  # Samples per frame of the generator's input.
CHANNELS = (512, 256, 128, 64, 32)
SLOPE = 0.1
Score = tuple[Tensor, list[Tensor]]  # The output of a discriminator, and the outputs of its layers.


class ResidualBlock(nn.Module):
    """Three pairs of convolutions with growing dilation."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.dilated, self.plain = (
            nn.ModuleList(nn.Conv1d(channels, channels, kernel, 1, "same", d) for d in dilations)
            for dilations in ((1, 3, 5), (1, 1, 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        for dilated, plain in zip(self.dilated, self.plain, strict=True):
            x = x + plain(F.leaky_relu(dilated(F.leaky_relu(x, SLOPE)), SLOPE))
        return x


class Generator(nn.Module):
    """Turns a mel spectrogram (batch, bands, frames) into a waveform (batch, 1, samples)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(MEL_BANDS, CHANNELS[0], 7, padding=3)
        self.up = nn.ModuleList(nn.ConvTranspose1d(a, b, 8, 4, 2) for a, b in pairwise(CHANNELS))
        self.blocks = nn.ModuleList(
            nn.ModuleList(ResidualBlock(c, kernel) for kernel in (3, 7, 11)) for c in CHANNELS[1:]
        )
        self.last = nn.Conv1d(CHANNELS[-1], 1, 7, padding=3)

    def forward(self, mel: Tensor) -> Tensor:
        x = self.first(mel)
        for up, blocks in zip(self.up, self.blocks, strict=True):
            x = up(F.leaky_relu(x, SLOPE))
            x = sum(block(x) for block in blocks) / len(blocks)
        return torch.tanh(self.last(F.leaky_relu(x)))


class Discriminator(nn.Module):
    """A stack of convolutions that also returns the output of each. With a period, it puts samples
    that are one period apart side by side."""

    def __init__(self, convs: Sequence[nn.Module], period: int | None = None) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convs)
        self.period = period

    def forward(self, x: Tensor) -> Score:
        if self.period is not None:
            x = F.pad(x, (0, -x.shape[-1] % self.period), mode="reflect")
            x = x.unflatten(-1, (-1, self.period))
        features = []
        for conv in self.convs[:-1]:
            x = F.leaky_relu(conv(x), SLOPE)
            features.append(x)
        return self.convs[-1](x).flatten(1), features


def _of_period(period: int) -> Discriminator:
    widths = pairwise((1, 32, 128, 512, 1024))
    convs = [nn.Conv2d(a, b, (5, 1), (3, 1), (2, 0)) for a, b in widths]
    convs.append(nn.Conv2d(1024, 1024, (5, 1), padding=(2, 0)))
    convs.append(nn.Conv2d(1024, 1, (3, 1), padding=(1, 0)))
    return Discriminator(convs, period)


def _of_scale() -> Discriminator:
    """Make a discriminator of consecutive samples."""
    sizes = (  # channels, kernel, stride, groups
        (1, 128, 15, 1, 1),
        (128, 128, 41, 2, 4),
        (128, 256, 41, 2, 16),
        (256, 512, 41, 4, 16),
        (512, 1024, 41, 4, 16),
        (1024, 1024, 41, 1, 16),
        (1024, 1024, 5, 1, 1),
        (1024, 1, 3, 1, 1),
    )
    return Discriminator([nn.Conv1d(a, b, k, s, k // 2, groups=n) for a, b, k, s, n in sizes])


class Discriminators(nn.Module):
    """The multi-period and the multi-scale discriminator."""

    def __init__(self) -> None:
        super().__init__()
        self.periods = nn.ModuleList(map(_of_period, (2, 3, 5, 7, 11)))
        self.scales = nn.ModuleList(_of_scale() for _ in range(3))
        for conv in self.scales[0].convs:
            spectral_norm(conv)

    def forward(self, x: Tensor) -> list[Score]:
        scores = [discriminator(x) for discriminator in self.periods]
        for i, discriminator in enumerate(self.scales):
            if i:
                x = F.avg_pool1d(x, 4, stride=2, padding=2)
            scores.append(discriminator(x))
        return scores


def weight_normed(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a generator or of discriminators that have weight norm in HiFi-GAN."""
    convs = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d)
    return [m for m in model.modules() if isinstance(m, convs) and "weight" in m._parameters]


def discriminator_loss(real: list[Score], generated: list[Score]) -> Tensor:
    """Return the least squares loss with target 1 for real audio and 0 for generated audio."""
    pairs = zip(real, generated, strict=True)
    return sum((1 - r).square().mean() + g.square().mean() for (r, _), (g, _) in pairs)


def generator_loss(real: list[Score], generated: list[Score], x: Tensor, audio: Tensor) -> Tensor:
    """Return the sum of the least squares loss, the feature matching loss, and the distance to the
    audio (in the paper the distance is between spectrograms)."""
    loss = 45 * F.l1_loss(x, audio)
    for (_, real_features), (score, features) in zip(real, generated, strict=True):
        loss = loss + (1 - score).square().mean()
        loss = loss + 2 * sum(map(F.l1_loss, features, real_features))
    return loss
