"""The size of a run: three sizes in one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from .results import Result


@dataclass(frozen=True)
class Plan:
    """The settings of a run. Budgets are the seconds of sampling for one case. A case whose three
    rounds take longer is finished anyway."""

    limit_s: float | None
    """After this many seconds no further case begins; the report says how many were left out."""
    layer_budget_s: float
    host_budget_s: float
    compile_budget_s: float
    model_budget_s: float
    step_budget_s: float
    every: int  # Take every n-th weight of the grid (and all that are not normed along dim 0).
    max_numel: int | None  # Leave out larger weights.
    models: tuple[str, ...] | None  # None means all.
    compile_layers: int
    compile_models: tuple[str, ...]
    """Names in shapes.csv. Each takes almost a minute on each number of threads."""
    compile_model_budget_s: float
    compile_steps: tuple[str, ...]
    """Names in the transformers package. Each takes three minutes if the compiler's cache is empty.
    """
    fused_models: tuple[str, ...] | None  # Names in shapes.csv. None means all that the case knows.
    fused_budget_s: float
    flat_layers: tuple[int, ...]
    flat_budget_s: float
    gan_frames: int  # The length of the audio, in frames of 256 samples.
    gan_step: bool  # Whether to time whole GAN steps, too, not only their weight norms.
    gan_budget_s: float
    memory_phases: int  # How many of the phases training and no_grad to run.


_V1 = ("HiFi-GAN-V1",)
_SIZES = {  # quick, default, full
    "limit_s": (120.0, 600.0, None),
    "layer_budget_s": (0.08, 0.15, 1.0),
    "host_budget_s": (0.05, 0.12, 0.5),
    "compile_budget_s": (0.2, 0.5, 1.0),
    "model_budget_s": (0.8, 1.5, 6.0),
    "step_budget_s": (1.5, 2.5, 12.0),
    "every": (4, 1, 1),
    "max_numel": (5_000_000, None, None),
    "models": (("SpeechT5HifiGan", "EncodecModel"), None, None),
    "compile_layers": (1, 3, 99),
    "compile_models": ((), _V1, (*_V1, "DAC", "ParallelWaveGAN")),
    "compile_model_budget_s": (1.0, 4.0, 12.0),
    "compile_steps": ((), (), ("SpeechT5HifiGan", "DacModel")),
    "fused_models": (("SpeechT5HifiGan", "ParallelWaveGAN"), None, None),
    "fused_budget_s": (0.8, 2.5, 10.0),
    "flat_layers": ((4, 64), (1, 4, 16, 64, 256), (1, 2, 4, 8, 16, 32, 64, 128, 256)),
    "flat_budget_s": (0.3, 1.0, 4.0),
    "gan_frames": (8, 16, 32),
    "gan_step": (False, True, True),
    "gan_budget_s": (1.0, 4.0, 40.0),
    "memory_phases": (1, 2, 2),
}
QUICK, DEFAULT, FULL = (
    Plan(**{name: values[k] for name, values in _SIZES.items()}) for k in range(3)
)


class Job(NamedTuple):
    """One step of the progress bar."""

    title: str
    run: Callable[[], list[Result]]
