"""Cases "gan" and "memory": a training step of HiFi-GAN, and the share of weight norm in it.

In each step the discriminators run twice for their own loss and twice for the generator's, as in
the original code. The cost of the weight norms is measured on the same sequence of reads, backwards
and changes without convolutions, because the difference of two whole steps would drown in their
noise. In this sequence every use of a weight gives a fresh gradient, as a convolution does. The
contender without weight norm makes and adds up these gradients, too; its time is subtracted.

A peak of memory comes from a fresh process. The process builds the generator, remembers its memory,
runs a few steps, and reports how much higher the peak was. This is resident memory, with everything
that malloc and buffer pools hold.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import hifigan, verify
from .contenders import BY_CASE, PLAIN, TORCH, Normed, Of, norm, random_grads
from .environment import Environment
from .models import LEARNING_RATE, OUTPUT_L2, training_step
from .plan import Job, Plan
from .processes import measure_apart, run_apart
from .results import GAN_STEP, NORMS, STEP, Result, memory_rows, of_list, rows
from .shapes import weight_list

CONTENDERS = BY_CASE["gan"]
MODEL = "SpeechT5HifiGan"
# The weights of each module must be those of these models in shapes.csv.
WEIGHTS = {hifigan.Generator: (MODEL,), hifigan.Discriminators: ("HiFi-GAN-MPD", "HiFi-GAN-MSD")}
BATCH = 1
CHECKED_RATE = 1e-3  # So large that a weight from before the step would fail the check.
CHECKED_FRAMES = 4
BEFORE_OPTIMIZER = 2  # The outputs of the first step that come before any optimizer's step.

Parts = tuple[Normed, Normed]  # The generator and the discriminators, as one contender has them.
NO_GRAD = "no_grad forward"
FRAMES = 8  # So few that weights and their gradients make the peak, not activations.
STEPS = 5
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def jobs(plan: Plan, where: Environment) -> list[Job]:
    """Make one job of the step and its weight norms."""
    return [Job(GAN_STEP, functools.partial(run, plan, where))]


def run(plan: Plan, where: Environment) -> list[Result]:
    """Verify, then time, the weight norms of a step and the whole step."""
    label = f"HiFi-GAN, batch {BATCH} x {plan.gan_frames * hifigan.UPSAMPLING} samples"
    numels = [c.numel for models in WEIGHTS.values() for m in models for c in weight_list(m)]
    about = of_list("gan", label, numels)
    errors = run_apart(functools.partial(_check_norms, where), where)
    prepare = {who: functools.partial(Norms, who, where) for who in CONTENDERS}
    stats = measure_apart(prepare, where, plan.gan_budget_s)
    out = rows(about.of_phase(NORMS), where, stats, errors=errors)
    if plan.gan_step:
        _check_steps(where)
        more = where, plan.gan_frames, LEARNING_RATE
        prepare = {who: functools.partial(Step, who, *more) for who in CONTENDERS}
        stats = measure_apart(prepare, where, plan.gan_budget_s)
        out += rows(about.of_phase(GAN_STEP), where, stats)
    return out


def build(
    kind: type[hifigan.Generator | hifigan.Discriminators], who: str, where: Environment
) -> Normed:
    """Build the generator or the discriminators, the same for every contender."""
    torch.manual_seed(0)
    model = kind().to(where.device)
    modules = hifigan.weight_normed(model)
    have = sorted(tuple(module.weight.shape) for module in modules)
    if have != sorted(case.shape for name in WEIGHTS[kind] for case in weight_list(name)):
        raise verify.VerificationError(f"{kind.__name__}: not the weights of {WEIGHTS[kind]}")
    return norm(who, model, [(module, 0) for module in modules])


class Norms:
    """The weight norms of a step: the reads, backwards and changes of :class:`Step`."""

    def __init__(self, who: str, where: Environment) -> None:
        self.parts = _parts(who, where)
        self.grads = [random_grads([m.weight for m in part.modules]) for part in self.parts]
        self._parameters = [part.parameters for part in self.parts]

    def __call__(self) -> None:
        self.until_gradients()
        self._step(0, 1)

    def until_gradients(self) -> None:
        """Run a step until both parts have the gradients of the generator's loss."""
        generated = self._forward(0)
        (self._forward(1) + self._forward(1)).backward()
        self._step(1)
        again = self._forward(1) + self._forward(1)
        (generated + again).backward()

    def _forward(self, k: int) -> Tensor:
        x = torch.zeros((), device=self._parameters[k][0].device, requires_grad=True)
        with self.parts[k].scope():
            for module, grad in zip(self.parts[k].modules, self.grads[k], strict=True):
                x = _Use.apply(x, module.weight, grad)
        return x

    def _step(self, *stepped: int) -> None:
        for k in stepped:
            for p in self._parameters[k]:
                p.grad = None
        for part in self.parts:  # a step of any torch optimizer counts for every group
            part.changed()


class _Use(torch.autograd.Function):
    """A layer without arithmetic, which holds its weight until its backward makes a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
        ctx.weight, ctx.grad = weight, grad
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor, Tensor, None]:
        ctx.weight = None
        return grad_x, ctx.grad.clone(), None


class Step:
    """A training step."""

    def __init__(self, who: str, where: Environment, frames: int, rate: float) -> None:
        parts = _parts(who, where)
        self.generator, self.discriminators = (part.model for part in parts)
        self.optimizers = [
            torch.optim.AdamW(part.model.parameters(), lr=rate, betas=(0.8, 0.99)) for part in parts
        ]
        random = torch.Generator().manual_seed(1)
        mel = torch.randn(BATCH, hifigan.MEL_BANDS, frames, generator=random)
        audio = torch.rand(BATCH, 1, frames * hifigan.UPSAMPLING, generator=random)
        self.mel, self.audio = mel.to(where.device), (2 * audio - 1).to(where.device)

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the waveform, the loss of the discriminators and the loss of the generator."""
        for_generator, for_discriminators = self.optimizers
        audio, discriminators = self.audio, self.discriminators
        x = self.generator(self.mel)

        for_discriminators.zero_grad()
        loss_d = hifigan.discriminator_loss(discriminators(audio), discriminators(x.detach()))
        loss_d.backward()
        for_discriminators.step()

        for_generator.zero_grad()
        loss_g = hifigan.generator_loss(discriminators(audio), discriminators(x), x, audio)
        loss_g.backward()
        for_generator.step()
        return x, loss_d, loss_g


def _parts(who: str, where: Environment) -> Parts:
    return build(hifigan.Generator, who, where), build(hifigan.Discriminators, who, where)


def _check_norms(where: Environment) -> dict[str, float]:
    """Check the weights and gradients of a second step against float64; return the worst errors."""
    checkers = verify.Checker("generator", where), verify.Checker("discriminators", where)
    errors: dict[str, float] = {}
    for who in CONTENDERS:
        norms = Norms(who, where)
        norms()
        norms.until_gradients()
        for part, grads, uses, checker in zip(
            norms.parts, norms.grads, (1, 2), checkers, strict=True
        ):
            grads = [uses * grad for grad in grads]
            with part.scope():
                weights = [module.weight for module in part.modules]
            if who == PLAIN:
                for weight, grad in zip(weights, grads, strict=True):
                    verify.check_same(f"{who}, {GAN_STEP}", weight.grad, grad, 0.0)
                continue
            pairs = zip(weights, part.layers, strict=True)
            results = [Of(w, layer.v.grad, layer.g.grad) for w, layer in pairs]
            error = checker.check(who, part.layers, results, grads)
            errors[who] = max(error, errors.get(who, 0.0))
    return errors


def _check_steps(where: Environment) -> None:
    """Compare outputs and losses of two steps with those of torch's layers. (Without weight norm an
    optimizer's step gives other weights; then only outputs before the first step are compared.)"""
    took = {w: run_apart(functools.partial(_two_steps, w, where), where) for w in CONTENDERS}
    for who, got in took.items():
        for i, (have, want) in enumerate(zip(got, took[TORCH], strict=True)):
            if who != PLAIN or i < BEFORE_OPTIMIZER:
                title = f"{who}, {GAN_STEP}, output {i}"
                have, want = torch.from_numpy(have), torch.from_numpy(want)
                verify.check_same(title, have, want, OUTPUT_L2)


def _two_steps(who: str, where: Environment) -> list[np.ndarray]:
    step = Step(who, where, CHECKED_FRAMES, CHECKED_RATE)
    return [t.detach().cpu().numpy() for _ in range(2) for t in step()]


def can_measure() -> bool:
    """Whether this system can tell the peak memory of a process."""
    return _STATUS.exists() and _CLEAR_REFS.exists()


def memory_jobs(plan: Plan, where: Environment) -> list[Job]:
    """Make one job per phase."""
    phases = (STEP, NO_GRAD)[: plan.memory_phases]
    return [Job(f"memory, {p}", functools.partial(run_memory, p, where)) for p in phases]


def run_memory(phase: str, where: Environment) -> list[Result]:
    """Measure the peak of every contender."""
    peak = functools.partial(_peak, phase=phase, where=where)
    peaks = {w: run_apart(functools.partial(peak, w), where) for w in BY_CASE["memory"]}
    about = of_list("memory", MODEL, [c.numel for c in weight_list(MODEL)], phase)
    return memory_rows(about, where, peaks)


def _peak(who: str, phase: str, where: Environment) -> float:
    """Return the peak memory of some steps in bytes, above that of the built model."""
    generator = build(hifigan.Generator, who, where)
    mel = torch.randn(1, hifigan.MEL_BANDS, FRAMES, generator=torch.Generator().manual_seed(1))
    mel = mel.to(where.device)
    forward = functools.partial(generator.model, mel)
    training = training_step(generator.model, forward)
    step = training if phase == STEP else torch.no_grad()(forward)
    before = _reset()
    for _ in range(STEPS):
        step()
    peak = _status("VmHWM") - before
    _check_memory(who, generator, mel, where)
    return peak


def _check_memory(who: str, generator: Normed, mel: Tensor, where: Environment) -> None:
    if who == PLAIN:
        return
    folded = hifigan.Generator().to(where.device)
    for module, layer in zip(hifigan.weight_normed(folded), generator.layers, strict=True):
        want = verify.reference(layer.v, layer.g, layer.dim, torch.zeros_like(layer.v))
        module.weight.data.copy_(want.w)
        module.bias.data.copy_(layer.module.bias)
    with torch.no_grad():
        verify.check_same(f"{who}, memory", generator.model(mel), folded(mel), OUTPUT_L2)


def _reset() -> int:
    """Reset the peak, and return the memory in use, in bytes."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # free memory from building the model would hide a part of the peak
    _CLEAR_REFS.write_text("5")  # resets the peak
    return _status("VmRSS")


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    return 1024 * int(found[1])
