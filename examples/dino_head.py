"""Train a small network without labels under a DINO head whose g is 1 and frozen.

    pip install '.[examples]'
    python examples/dino_head.py --out dino     # --short takes seconds

DINO (Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", 2021,
https://arxiv.org/abs/2104.14294) ends in a weight-normed layer without bias. Its g is filled with 1
and frozen, so every row of w has length 1: with a normalised bottleneck the outputs are cosines.
A student sees one view of an image and learns what its teacher, an average of students, says of
another. The head below is written as DINO's code has it, with torch's function; patch_torch() makes
that build wnkernel's layer, which can also be deep-copied at any time.

The images are circles, squares, triangles and crosses that numpy draws. No label is used until the
end, when each new image gets the shape of its nearest neighbours among old ones.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import numpy as np
import torch
import typer
from common import CONSOLE, Out, Short, done, picture, smooth
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

import wnkernel

SHAPES = ("circle", "square", "triangle", "cross")
SIZE, BATCH, BOTTLENECK, PROTOTYPES = 32, 64, 32, 128
WARM, COLD = 0.1, 0.02
"""Temperatures of the student and of the teacher."""
MOMENTUM = 0.99


class Head(nn.Module):
    """DINO's projection head, with one hidden layer less."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(features, 128), nn.GELU(), nn.Linear(128, BOTTLENECK))
        self.last_layer = nn.utils.weight_norm(nn.Linear(BOTTLENECK, PROTOTYPES, bias=False))
        self.last_layer.weight_g.data.fill_(1)
        self.last_layer.weight_g.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        """Cosines of the angles between an image and the prototypes."""
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


def network() -> nn.Sequential:
    """A backbone of convolutions and a head."""

    def layer(given: int, channels: int) -> list[nn.Module]:
        convolution = nn.Conv2d(given, channels, 3, stride=2, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(channels), nn.ReLU()]

    pool = [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    backbone = nn.Sequential(*layer(1, 16), *layer(16, 32), *layer(32, 64), *pool)
    with warnings.catch_warnings(), wnkernel.patch_torch():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, of its legacy weight norm
        return nn.Sequential(backbone, Head(256))


def draw(kinds: np.ndarray, random: np.random.Generator) -> Tensor:
    """Images ``[image, 1, SIZE, SIZE]`` of shapes of any size, place, angle and brightness."""
    n = (len(kinds), 1, 1)
    across = np.linspace(-1, 1, SIZE)
    x = across - random.uniform(-0.3, 0.3, n)
    y = across[:, None] - random.uniform(-0.3, 0.3, n)
    angle, size = random.uniform(-0.4, 0.4, n), random.uniform(0.35, 0.6, n)
    u = (x * np.cos(angle) + y * np.sin(angle)) / size
    v = (y * np.cos(angle) - x * np.sin(angle)) / size
    near, far = np.minimum(abs(u), abs(v)), np.maximum(abs(u), abs(v))
    circles, squares = np.hypot(u, v) < 1, far < 0.9
    triangles, crosses = (abs(u) < (v + 1) / 2) & (v < 1), (near < 0.3) & (far < 1)
    images = np.choose(kinds[:, None, None], (circles, squares, triangles, crosses))
    return torch.from_numpy(images).float()[:, None]


def view(images: Tensor) -> Tensor:
    """The images moved, zoomed and turned a little, brighter or darker, with noise."""
    n = len(images)
    angle, zoom = torch.rand(n) - 0.5, torch.rand(n) * 0.6 + 0.8
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(n, 2, 2)
    matrix = torch.cat([turn * zoom[:, None, None], (torch.rand(n, 2, 1) - 0.5) * 0.5], 2)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    return moved * (torch.rand(n, 1, 1, 1) + 0.5) + 0.1 * torch.randn_like(moved)


@torch.no_grad()
def features(backbone: nn.Module, images: Tensor) -> Tensor:
    """What the backbone makes of images, of length 1."""
    return F.normalize(backbone.eval()(images), dim=-1)


def accuracy(
    backbone: nn.Module, old: Tensor, shapes: Tensor, new: Tensor, answers: Tensor
) -> float:
    """The share of new images whose 10 nearest old ones have, most often, the right shape."""
    nearest = (features(backbone, new) @ features(backbone, old).T).topk(10).indices
    return (shapes[nearest].mode(1).values == answers).float().mean().item()


def draw_results(
    path: Path, losses: list[float], student: nn.Module, images: Tensor, shapes: Tensor
) -> None:
    """Losses, the images nearest to some prototypes, and the features."""
    with picture(path, 3) as (left, middle, right):
        left.plot(smooth(losses))
        left.axhline(np.log(PROTOTYPES), color="0.6", linewidth=1)
        left.set(xlabel="step", ylabel="loss, mean of 20 steps", title="self-distillation")
        with torch.no_grad():
            cosines = student.eval()(images)
        favourites = cosines.mean(0).topk(6).indices
        rows = cosines[:, favourites].topk(6, dim=0).indices.T
        middle.imshow(torch.cat([torch.cat([*images[row, 0]], 1) for row in rows]), cmap="gray")
        middle.set(title="nearest images of six prototypes", xticks=[], yticks=[])
        points = features(student[0], images)
        flat = (points - points.mean(0)) @ torch.pca_lowrank(points, 2)[2]
        for k, shape in enumerate(SHAPES):
            right.plot(*flat[shapes == k].T, ".", markersize=3, label=shape)
        right.set(title="features, two principal components", xticks=[], yticks=[])
        right.legend(markerscale=3)


def main(out: Out = Path("."), short: Short = False) -> None:
    """Train, and look at g, at the lengths of rows, and at what the features are good for."""
    torch.set_num_threads(1)  # layers as small as these gain nothing by more
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    shapes = random.integers(4, size=(2, 1000))
    old, new = (draw(kinds, random) + 0.2 * torch.randn(1000, 1, SIZE, SIZE) for kinds in shapes)
    seen, answers = torch.from_numpy(shapes)

    student = network()
    untrained, teacher = copy.deepcopy(student[0]), copy.deepcopy(student).requires_grad_(False)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 2e-3)
    centre, losses = torch.zeros(PROTOTYPES), []
    for _ in track(range(10 if short else 800), "training"):
        images = draw(random.integers(4, size=BATCH), random)
        one, other = view(images), view(images)
        with torch.no_grad():
            said = teacher(torch.cat([other, one]))
            target = ((said - centre) / COLD).softmax(-1)
            centre.lerp_(said.mean(0), 0.1)
        loss = F.cross_entropy(student(torch.cat([one, other])) / WARM, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for average, p in zip(teacher.parameters(), student.parameters(), strict=True):
                average.lerp_(p, 1 - MOMENTUM)  # g too: the average of ones is 1
        losses.append(loss.item())

    layer = student[1].last_layer
    g, lengths = layer.weight_g, layer.weight.norm(dim=1)
    if not (g == 1).all() or g.grad is not None or any(g is p for p in trained):
        raise SystemExit("g did not stay frozen")
    torch.testing.assert_close(lengths, torch.ones(PROTOTYPES))
    before, after = (accuracy(b, old, seen, new, answers) for b in (untrained, student[0]))

    draw_results(out / "dino_head.png", losses, student, new, answers)
    CONSOLE.print(
        f"new images whose neighbours have their shape: {after:.1%}, untrained {before:.1%}"
    )
    done(
        f"g is still 1 in all {PROTOTYPES} rows and is in no optimizer; rows of w are as long, "
        f"up to {(lengths - 1).abs().max():.0e}.",
        out / "dino_head.png",
    )


if __name__ == "__main__":
    typer.run(main)
