"""A denoiser of EDM2's layers, trained with the formulas in plain torch and with ours."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

import wnkernel
from wnkernel import normalize_

from . import edm2
from .edm2 import Layer, MPConv, original

F32, F64 = torch.float32, torch.float64
STEPS = 30


def mp_silu(x: Tensor) -> Tensor:
    """Equation 81."""
    return functional.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float = 0.3) -> Tensor:
    """Equation 88."""
    return a.lerp(b, t) / math.hypot(1 - t, t)


class Block(nn.Module):
    """A residual branch whose middle is scaled by an embedding of the noise level."""

    def __init__(self, make: type[MPConv], width: int, of_embedding: int) -> None:
        super().__init__()
        self.first = make(width, width, 3, 3)
        self.embed = make(width, of_embedding)
        self.second = make(width, width, 3, 3)
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        y = self.first(mp_silu(x))
        scale = self.embed(embedding) * self.gain + 1
        return mp_sum(x, self.second(mp_silu(y * scale[:, :, None, None])))


class Denoiser(nn.Module):
    """Two levels, the lower of them with a skip; inputs get a channel of ones, as in EDM2."""

    def __init__(self, make: type[MPConv], width: int = 6) -> None:
        super().__init__()
        self.embed = make(8, 4)
        self.into = make(width, 3, 3, 3)
        self.blocks = nn.ModuleList(Block(make, width, 8) for _ in range(3))
        self.join = make(width, 2 * width, 1, 1)
        self.out = make(2, width, 3, 3)
        self.out_gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        c_skip, c_out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / (sigma**2 + 0.25).sqrt()
        phases = sigma.flatten().log()[:, None] * torch.arange(1, 5, dtype=x.dtype)
        embedding = mp_silu(self.embed(math.sqrt(2) * phases.cos()))
        h = x / (sigma**2 + 0.25).sqrt()
        skip = self.blocks[0](self.into(torch.cat([h, torch.ones_like(h[:, :1])], 1)), embedding)
        low = self.blocks[1](functional.avg_pool2d(skip, 2), embedding)
        up = functional.interpolate(low, scale_factor=2)
        h = self.blocks[2](self.join(torch.cat([up, skip], 1)), embedding)
        return c_skip * x + c_out * (self.out(h) * self.out_gain)


def denoiser(make: type[MPConv], dtype: torch.dtype = F64) -> Denoiser:
    """The same in every call, whoever makes its layers."""
    torch.manual_seed(3)
    return Denoiser(make).to(dtype)


def train(model: Denoiser, steps: int = STEPS) -> list[float]:
    """The loss of every step, with EDM2's optimizer and decay of the learning rate, on two batches
    in turns."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02, betas=(0.9, 0.99))
    dtype = model.out_gain.dtype
    losses = []
    model.train()
    for k in range(steps):
        random = torch.Generator("cpu").manual_seed(k % 2)
        for group in optimizer.param_groups:
            group["lr"] = 0.02 / math.sqrt(max(k / 10, 1))
        y, noise = (torch.randn(4, 2, 6, 6, generator=random, dtype=F64) for _ in range(2))
        sigma = torch.randn(4, 1, 1, 1, generator=random, dtype=F64).sub(0.4).exp()
        y = (y.cumsum(-1) / 3).sin() * 0.5
        y, noise, sigma = (t.to(model.out_gain) for t in (y, noise, sigma))
        optimizer.zero_grad()
        weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
        loss = (weight * (model(y + sigma * noise, sigma) - y).square()).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert model.out_gain.dtype == dtype
    return losses


@functools.cache
def trained_by_formulas() -> tuple[list[float], Denoiser]:
    model = denoiser(MPConv)
    return train(model), model


@pytest.mark.parametrize("how", ["alone", "forward", "version"])
def test_losses_in_float64(backend: str, how: str) -> None:
    want, plain = trained_by_formulas()
    model = denoiser(Layer)
    if how != "alone":
        wnkernel.fuse(model, reuse=how)
    got = train(model)
    assert got == pytest.approx(want, rel=1e-9)
    assert sum(want[-10:]) < 0.85 * sum(want[:10])  # it learns something
    state = model.state_dict()
    for name, p in plain.state_dict().items():
        torch.testing.assert_close(state[name], p, rtol=1e-6, atol=1e-8)


def test_losses_in_float32(backend: str) -> None:
    want, _ = trained_by_formulas()
    for fused in (False, True):
        model = denoiser(Layer, F32)
        if fused:
            wnkernel.fuse(model)
        assert train(model, 15) == pytest.approx(want[:15], rel=1e-4)


def test_training_goes_on_from_a_file_of_the_other(backend: str) -> None:
    _, plain = trained_by_formulas()
    model, twin = denoiser(Layer), denoiser(MPConv)
    model.load_state_dict(plain.state_dict())
    twin.load_state_dict(plain.state_dict())
    assert train(model, 10) == pytest.approx(train(twin, 10), rel=1e-9)
    twin.load_state_dict(model.state_dict())
    x, sigma = torch.randn(2, 2, 6, 6, dtype=F64), torch.ones(2, 1, 1, 1, dtype=F64)
    torch.testing.assert_close(model.eval()(x, sigma), twin.eval()(x, sigma), rtol=1e-9, atol=1e-12)


def test_folded_weights_of_inference(backend: str) -> None:
    """MMAudio writes w over v before inference, under the same key. Such a file goes into plain
    layers; in ours its rows, of norm 1, are w again up to eps sqrt(N), as in MMAudio itself."""
    _, plain = trained_by_formulas()
    folded = {name: edm2.weight(t) if t.ndim > 1 else t for name, t in plain.state_dict().items()}
    model = denoiser(Layer).eval()
    model.load_state_dict(plain.state_dict())
    x, sigma = torch.randn(2, 2, 6, 6, dtype=F64), torch.ones(2, 1, 1, 1, dtype=F64)
    want = model(x, sigma)
    for m in list(model.modules()):
        if parametrize.is_parametrized(m):
            parametrize.remove_parametrizations(m, "weight")
    state = model.state_dict()
    assert state.keys() == folded.keys()
    for name, t in folded.items():
        torch.testing.assert_close(state[name], t, rtol=1e-10, atol=1e-14)
    assert torch.equal(model(x, sigma), want)
    again = denoiser(Layer).eval()
    again.load_state_dict(folded)
    for m in again.modules():
        if parametrize.is_parametrized(m):
            v = original(m)
            root = math.sqrt(v[0].numel())
            factor = 1 / (v.flatten(1).norm(dim=1) + 1e-4 * root)
            shape = -1, *[1] * (v.ndim - 1)
            torch.testing.assert_close(m.weight, v * factor.view(shape), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(again(x, sigma), want, rtol=2e-2, atol=2e-2)


def test_normalizing_after_the_step_is_nearly_the_same(backend: str) -> None:
    """Equation 66 as the paper words it, before which no forward has seen v: without eps, and with
    v that begin on the sphere, the same curve."""

    class Other(Layer):
        def __init__(self, *shape: int) -> None:
            super().__init__(*shape, eps=0.0)

    forced_, after = denoiser(Other), denoiser(Other)
    v = [original(m) for m in after.modules() if isinstance(m, Other)]
    norms = [math.sqrt(p[0].numel()) for p in v]
    with torch.no_grad():
        for p, norm in zip(v, norms, strict=True):
            normalize_([p], norm=norm)

    class InEval(Denoiser):
        """Whose weights are never written in a forward."""

        def train(self, mode: bool = True) -> Denoiser:
            return super().train(False)

    after.__class__ = InEval
    with wnkernel.normalize_after_step(v, norm=norms):
        got = train(after, 10)
    assert got == pytest.approx(train(forced_, 10), rel=1e-9)
