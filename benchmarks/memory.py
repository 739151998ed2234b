"""Case "memory": what weight norms add to the peak memory of a model.

Every figure comes from a fresh process, which builds the generator of HiFi-GAN, remembers how much
memory it has, runs a few steps, and reports by how much the peak was higher: of resident memory,
with everything that malloc and buffer pools hold on to.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import re
from pathlib import Path

import torch
from torch import Tensor

from . import gan, hifigan, verify
from .contenders import BY_CASE, PLAIN, Normed
from .environment import Environment
from .models import OUTPUT_L2, training_step
from .plan import Job, Plan
from .processes import run_apart
from .results import STEP, Result, memory_rows, of_list
from .shapes import weight_list

NO_GRAD = "no_grad forward"
MODEL = "SpeechT5HifiGan"
FRAMES = 8  # So few that weights and their gradients, not activations, make the peak.
STEPS = 5
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def can_measure() -> bool:
    """Whether the peak of a process can be told on this system."""
    return _STATUS.exists() and _CLEAR_REFS.exists()


def jobs(plan: Plan, where: Environment) -> list[Job]:
    """One job per phase."""
    phases = (STEP, NO_GRAD)[: plan.memory_phases]
    return [Job(f"memory, {phase}", functools.partial(run, phase, where)) for phase in phases]


def run(phase: str, where: Environment) -> list[Result]:
    """The peak of every contender."""
    peaks = {
        who: run_apart(functools.partial(_peak, who, phase, where), where)
        for who in BY_CASE["memory"]
    }
    about = of_list("memory", MODEL, [c.numel for c in weight_list(MODEL)], phase)
    return memory_rows(about, where, peaks)


def _peak(who: str, phase: str, where: Environment) -> float:
    """Peak memory of some steps in bytes, above what there is when the model is built."""
    generator = gan.build(hifigan.Generator, who, where)
    mel = torch.randn(1, hifigan.MEL_BANDS, FRAMES, generator=torch.Generator().manual_seed(1))
    mel = mel.to(where.device)
    forward = functools.partial(generator.model, mel)
    training = training_step(generator.model, forward)
    step = training if phase == STEP else torch.no_grad()(forward)
    before = _reset()
    for _ in range(STEPS):
        step()
    peak = _status("VmHWM") - before
    _check(who, generator, mel, where)
    return peak


def _check(who: str, generator: Normed, mel: Tensor, where: Environment) -> None:
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
    """Forget the peak so far, and say what is in use, in bytes."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # what building the model left behind would hide a part of the peak
        trim(0)
    _CLEAR_REFS.write_text(_RESET_PEAK)
    return _status("VmRSS")


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    return 1024 * int(found[1])
