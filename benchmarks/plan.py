"""The size of a run: a table of three sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from .results import Result
from .shapes import NORMALIZED

_V1 = ("HiFi-GAN-V1",)


def _sizes(quick: object, default: object, full: object) -> Any:
    return field(metadata={"sizes": (quick, default, full)})


@dataclass(frozen=True)
class Plan:
    """The settings of a run in three sizes: quick, default and full. Budgets are the seconds of
    sampling for one case. A case whose three rounds take longer is finished anyway."""

    # After this many seconds no further case begins; the report says how many were left out.
    limit_s: float | None = _sizes(120.0, 600.0, None)
    layer_budget_s: float = _sizes(0.08, 0.15, 1.0)
    host_budget_s: float = _sizes(0.05, 0.12, 0.5)
    compile_budget_s: float = _sizes(0.2, 0.5, 1.0)
    model_budget_s: float = _sizes(0.8, 1.5, 6.0)
    step_budget_s: float = _sizes(1.5, 2.5, 12.0)
    # Take every n-th weight of the grid (and all that are not normed along dim 0).
    every: int = _sizes(4, 1, 1)
    max_numel: int | None = _sizes(5_000_000, None, None)  # Leave out larger weights.
    # None means all models.
    models: tuple[str, ...] | None = _sizes(("SpeechT5HifiGan", "EncodecModel"), None, None)
    compile_layers: int = _sizes(1, 3, 99)
    # Names in shapes.csv. Each takes almost a minute on each number of threads.
    compile_models: tuple[str, ...] = _sizes((), _V1, (*_V1, "DAC", "ParallelWaveGAN"))
    compile_model_budget_s: float = _sizes(1.0, 4.0, 12.0)
    # Names in the transformers package. Each takes three minutes if the compiler's cache is empty.
    compile_steps: tuple[str, ...] = _sizes((), (), ("SpeechT5HifiGan", "DacModel"))
    # Names in shapes.csv. None means all that the case knows.
    fused_models: tuple[str, ...] | None = _sizes(
        ("SpeechT5HifiGan", "ParallelWaveGAN"), None, None
    )
    fused_budget_s: float = _sizes(0.8, 2.5, 10.0)
    flat_layers: tuple[int, ...] = _sizes(
        (4, 64), (1, 4, 16, 64, 256), (1, 2, 4, 8, 16, 32, 64, 128, 256)
    )
    flat_budget_s: float = _sizes(0.3, 1.0, 4.0)
    gan_frames: int = _sizes(8, 16, 32)  # The length of the audio, in frames of 256 samples.
    gan_step: bool = _sizes(False, True, True)  # Whether to time whole GAN steps, too.
    gan_budget_s: float = _sizes(1.0, 4.0, 40.0)
    # Names in shapes.csv, besides 64 equal matrices.
    normalize_models: tuple[str, ...] = _sizes((), NORMALIZED, NORMALIZED)
    normalize_budget_s: float = _sizes(0.8, 3.0, 12.0)
    # Whether the published loop runs compiled, too. That takes up to half a minute for each set.
    normalize_compiled: bool = _sizes(False, True, True)
    forced_every: int = _sizes(32, 4, 1)  # Take every n-th layer of EDM2-S.
    memory_phases: int = _sizes(1, 2, 2)  # How many of the phases training and no_grad to run.


QUICK, DEFAULT, FULL = (
    Plan(**{f.name: f.metadata["sizes"][k] for f in fields(Plan)}) for k in range(3)
)


class Job(NamedTuple):
    """One step of the progress bar."""

    title: str
    run: Callable[[], list[Result]]
